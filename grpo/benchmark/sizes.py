"""The sizes of a step, and how many parameters its model has.

| P | prompt tokens | S | patches of its videos | G | completions | C | tokens of each | L | tokens of the packed row |
| V | vocabulary | E | hidden size | MLP | its inner size | K | size of a token's keys | W, J | E and MLP of the tower |
"""

from dataclasses import dataclass

from data.media.patches import MERGE_SIZE, PATCH_SIZE, PATCH_VALUES, SIZE_FACTOR, TEMPORAL_PATCH_SIZE
from grpo.model.random_model import SIZES, TextSize, VisionSize

FLOAT32, WORDS_AROUND_VIDEOS, TAGS_PER_VIDEO = 4, 40, 2


def video_grid(options) -> tuple[int, int, int]:
    """Return the patches of a video of the benchmark's prompt along time, height and width."""
    side = max(1, round(options.resolution / SIZE_FACTOR)) * SIZE_FACTOR // PATCH_SIZE
    return options.frames // TEMPORAL_PATCH_SIZE, side, side


@dataclass(frozen=True)
class Plan:
    """The sizes of a step: the model, one prompt and its group on each GPU, and how they are trained."""

    text: TextSize
    vision: VisionSize
    P: int
    S: int
    patches_per_video: int
    G: int
    C: int
    gpus: int  # of a node, over which the weights are sharded; 0: a CPU process, in float32 and without FSDP
    trains_tower: bool
    lora_rank: int  # 0: no adapters
    beta: float

    @classmethod
    def of(cls, options) -> "Plan":
        """Take them from the flags of the benchmark."""
        t, h, w = video_grid(options)
        return cls(
            *SIZES[options.size],
            P=WORDS_AROUND_VIDEOS + options.num_videos * (t * h * w // MERGE_SIZE**2 + TAGS_PER_VIDEO),
            S=options.num_videos * t * h * w,
            patches_per_video=t * h * w,
            G=options.num_generations,
            C=options.completion_length,
            gpus=options.gpus,
            trains_tower=not options.freeze_vision_tower,
            lora_rank=options.lora_rank if options.lora_enable else 0,
            beta=options.beta,
        )

    @property
    def bytes(self) -> int:
        """Of a number in compute precision."""
        return 2 if self.gpus else FLOAT32

    @property
    def shards(self) -> int:
        return max(1, self.gpus)

    @property
    def L(self) -> int:
        return self.P + self.G * self.C

    @property
    def K(self) -> int:
        return self.text.num_key_value_heads * self.text.hidden_size // self.text.num_attention_heads


@dataclass(frozen=True)
class Parameters:
    """How many parameters each part has."""

    layer: int  # a decoder layer
    adapters: int  # of a decoder layer
    block: int  # of the vision tower
    embedding: int
    head: int  # 0 if it is the embedding
    patch_embed: int
    merger: int

    @classmethod
    def of(cls, plan: Plan) -> "Parameters":
        """Count them from the sizes."""
        E, K, MLP, V = plan.text.hidden_size, plan.K, plan.text.intermediate_size, plan.text.vocab_size
        W, J, merged = plan.vision.hidden_size, plan.vision.intermediate_size, MERGE_SIZE**2 * plan.vision.hidden_size
        return cls(
            # query and output, key and value (all but the output with a bias); gate, up and down; two norms
            layer=(2 * E * E + E) + 2 * (E + 1) * K + 3 * E * MLP + 2 * E,
            adapters=plan.lora_rank * (2 * (E + E) + 2 * (E + K) + 3 * (E + MLP)),  # A and B of these seven matrices
            block=4 * (W + 1) * W + (3 * W * J + 2 * J + W) + 2 * W,  # query, key, value, output; the MLP; two norms
            embedding=V * E,
            head=0 if plan.text.tie_word_embeddings else V * E,
            patch_embed=PATCH_VALUES * W,
            merger=W + (merged + 1) * merged + (merged + 1) * E,  # a norm and two matrices
        )

    def counts(self, plan: Plan) -> tuple[int, int, int]:
        """Return all of the model, those that are trained, those that are frozen; adapters are in the last two only."""
        layers, tower = plan.text.num_hidden_layers, plan.vision.depth * self.block + self.patch_embed
        language_model = layers * self.layer + self.embedding + self.head + plan.text.hidden_size  # and the last norm
        total = language_model + tower + self.merger
        trained = layers * self.adapters if plan.lora_rank else language_model
        trained += self.merger + (tower if plan.trains_tower else 0)
        return total, trained, total + layers * self.adapters - trained

    def root(self, plan: Plan) -> int:
        """Return those outside layers and blocks: FSDP gathers them for a whole pass."""
        return self.embedding + self.head + self.patch_embed + self.merger + plan.text.hidden_size
