"""`python -m grpo.benchmark --on_paper`: what a step needs on GPUs that one does not have, computed from sizes alone.

Nothing is built or run. Memory is that of tensors: CUDA, NCCL and the gaps in the allocator's memory come on top, some
GB of each GPU. `tests/grpo/benchmark/test_on_paper.py` compares with what runs on a CPU really allocate; times are
lower bounds, which no run reaches.

| P | prompt tokens | S | patches of its videos | G | completions | C | tokens of each | L | tokens of the packed row |
| V | vocabulary | E | hidden size | K | size of all keys of a token | I | size of the MLP | W, J | E and I of the tower |
"""

from dataclasses import dataclass

from data.media.patches import MERGE_SIZE, PATCH_SIZE, PATCH_VALUES, SIZE_FACTOR, TEMPORAL_PATCH_SIZE
from grpo.decoding import MIN_PROMPT_CAPACITY
from grpo.logprobs import PATCHES_PER_PASS, TOKENS_PER_CHUNK
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
        E, K, I, V = plan.text.hidden_size, plan.K, plan.text.intermediate_size, plan.text.vocab_size
        W, J, merged = plan.vision.hidden_size, plan.vision.intermediate_size, MERGE_SIZE**2 * plan.vision.hidden_size
        return cls(
            # query and output, key and value (all but the output with a bias); gate, up and down; two norms
            layer=(2 * E * E + E) + 2 * (E + 1) * K + 3 * E * I + 2 * E,
            adapters=plan.lora_rank * (2 * (E + E) + 2 * (E + K) + 3 * (E + I)),  # A and B of these seven matrices
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


def resident(plan: Plan) -> dict[str, float]:
    """Return what is there all the time, in bytes per GPU."""
    total, trained, frozen = Parameters.of(plan).counts(plan)
    room = max(MIN_PROMPT_CAPACITY, 1 << (plan.P - 1).bit_length()) if plan.gpus else plan.P
    return {
        "weights": (FLOAT32 * trained + plan.bytes * frozen) / plan.shards,  # what is trained is kept in float32
        "Adam": 2 * FLOAT32 * trained / plan.shards,  # the mean and the mean square of each gradient
        "reference model": plan.bytes * total / plan.shards if plan.beta else 0,  # frozen, and sharded like the policy
        "sampling copy": plan.bytes * total,  # whole on every GPU: sampling reads all of it for every token
        "key-value cache": 2 * plan.text.num_hidden_layers * plan.K * (room + plan.G * plan.C) * plan.bytes,
        "pixels": PATCH_VALUES * plan.S,  # one byte each
    }


def layer_activations(plan: Plan, tokens: int, queries: int) -> float:
    """Return what a decoder layer keeps for its backward pass; the last one has fewer queries than tokens."""
    E, K, I = plan.text.hidden_size, plan.K, plan.text.intermediate_size
    norm = 1 if plan.gpus else 2  # the input; on a CPU, where the norm is not one kernel, also the normalised input
    attention = tokens * (norm * E + E + 2 * K) + plan.G * (plan.P + plan.C) * 2 * K  # the prompt's, per completion
    attention += queries * 3 * E  # queries, and what is attended to, before and after groups are joined to a row
    mlp = queries * (norm * E + E + 4 * I)  # gate, silu(gate), up, their product
    if plan.lora_rank:  # frozen matrices do not need their inputs; adapters need each one's own, behind dropout
        copies = 1 + (1 / plan.bytes if plan.gpus else 1)  # and the mask: a byte, on a CPU a number
        attention += copies * E * (2 * tokens + 2 * queries) - E * (tokens + queries)
        mlp += queries * (copies * (2 * E + I) - E - I)
        mlp += queries * 7 * plan.lora_rank
    return plan.bytes * (attention + mlp)


def block_activations(plan: Plan, patches: int) -> float:
    """Return what a block of the vision tower keeps: as in a layer, but keys are as many as queries, in one tensor."""
    W, J, norm = plan.vision.hidden_size, plan.vision.intermediate_size, 1 if plan.gpus else 2
    return plan.bytes * patches * (2 * (norm + 1) * W + 6 * W + 4 * J)


def kept(plan: Plan, checkpointing: bool) -> dict[str, float]:
    """Return what is kept for the backward pass of text and vision, and what one layer or block needs in its own."""
    E, W, L, layers = plan.text.hidden_size, plan.vision.hidden_size, plan.L, plan.text.num_hidden_layers
    queries = 1 + plan.G * plan.C  # of the last layer
    layer, block = layer_activations(plan, L, L), block_activations(plan, plan.S)
    if checkpointing:  # the input of each
        text, vision = layers * L * E * plan.bytes, plan.vision.depth * plan.S * W * plan.bytes
    else:
        text, vision = (layers - 1) * layer + layer_activations(plan, L, queries), plan.vision.depth * block
    # The merger keeps in- and output of its norm, and of its gelu; the tower its pixels.
    merger = (4 if plan.gpus else 5) * plan.S * W * plan.bytes
    tower = vision + PATCH_VALUES * plan.S * plan.bytes if plan.trains_tower else 0
    return {
        "text": text + queries * E * plan.bytes,  # and the last hidden states
        "vision": merger + tower,
        # On the way back there are two gradients of an MLP's tensors more than are freed, and those of in- and output.
        "layer": layer + 2 * L * (E + plan.text.intermediate_size) * plan.bytes,
        "block": (block + 2 * plan.S * (W + plan.vision.intermediate_size) * plan.bytes) * plan.trains_tower,
    }


def without_gradients(plan: Plan, tokens: int) -> float:
    """Return the activations of a pass that keeps nothing: residual stream, norm, and three tensors of an MLP."""
    return tokens * (2 * plan.text.hidden_size + 3 * plan.text.intermediate_size) * plan.bytes


def rollout_moments(plan: Plan) -> list[dict[str, float]]:
    """Return what the heaviest moments of a rollout need beside what is `resident`, in bytes per GPU."""
    p = Parameters.of(plan)
    _, trained, _ = p.counts(plan)
    gradients = {"gradients": FLOAT32 * trained / plan.shards}  # those of the step before, until the update
    device = "cuda" if plan.gpus else "cpu"
    patches = min(plan.S, max(1, PATCHES_PER_PASS[device] // plan.patches_per_video) * plan.patches_per_video)
    # Pixels as one row of bytes, and those of a pass as float32, before and after they are normalised.
    pixels = PATCH_VALUES * (plan.S + 2 * FLOAT32 * patches)
    tower = PATCH_VALUES * (plan.S + plan.bytes * patches)
    tower += patches * (2 * plan.vision.hidden_size + 3 * plan.vision.intermediate_size) * plan.bytes
    # FSDP gathers a group into one buffer and copies the weights out of it.
    sync = {"gathered weights": 2 * plan.bytes * p.root(plan) if plan.gpus else 0}
    moments = [sync, *({"activations": n} for n in (pixels, tower, without_gradients(plan, plan.P)))]
    return [gradients | moment for moment in moments]


def update_moments(plan: Plan, checkpointing: bool) -> list[dict[str, float]]:
    """Return what the heaviest moments of an update need beside what is `resident`, in bytes per GPU."""
    p, is_kept, lm_is_trained = Parameters.of(plan), kept(plan, checkpointing), not plan.lora_rank
    layers, E, is_sharded = plan.text.num_hidden_layers, plan.text.hidden_size, plan.gpus > 0
    layer = p.layer if lm_is_trained else p.adapters  # trained of it
    root = p.merger + (p.root(plan) - p.merger - p.patch_embed) * lm_is_trained + p.patch_embed * plan.trains_tower
    blocks = plan.vision.depth * p.block * plan.trains_tower
    num_logits = min(TOKENS_PER_CHUNK, plan.G * plan.C) * plan.text.vocab_size
    is_one_chunk = plan.G * plan.C <= TOKENS_PER_CHUNK
    of_head = plan.text.vocab_size * E * plan.bytes * lm_is_trained  # its gradient, in compute precision
    # The root stays gathered from the first to the last moment; of the layers there is one, and the next on its way.
    root_gathered = p.root(plan) * plan.bytes * is_sharded
    gathered = root_gathered + 2 * (p.layer + p.adapters) * plan.bytes * is_sharded
    # Gradients of a gathered layer are in compute precision, and are summed up over the GPUs in float32.
    reduced = layer * (plan.bytes + FLOAT32) * is_sharded
    text_gradients = layers * layer * FLOAT32 / plan.shards
    everything = is_kept["text"] + is_kept["vision"]
    moments = [
        {  # The log-probabilities go backward: logits and log-probabilities of a chunk, or what replaces them.
            "activations": everything,
            "logits": 2 * FLOAT32 * num_logits,
            "gathered weights": root_gathered,
            "gradients": of_head * (1 if is_one_chunk else 2),  # the sum so far and the next chunk's
        },
        {  # The last layers of the language model, ...
            "activations": everything + is_kept["layer"] * checkpointing,
            "gathered weights": gathered,
            "gradients": of_head,
            "reduction": reduced,
        },
        {  # ... and its first.
            "activations": is_kept["vision"] + is_kept["layer"],
            "gathered weights": gathered,
            "gradients": of_head + text_gradients,
            "reduction": reduced,
        },
        {  # The last blocks of the tower, ...
            "activations": is_kept["vision"] + is_kept["block"] * checkpointing,
            "gathered weights": root_gathered,
            "gradients": root * plan.bytes + text_gradients,
        },
        {  # ... and its first; then the gradients of the root are summed up.
            "activations": is_kept["block"] * (not is_sharded),
            "gathered weights": root_gathered,
            "gradients": root * plan.bytes + text_gradients + blocks * FLOAT32 / plan.shards,
            "reduction": root * FLOAT32 * (1 + 1 / plan.shards) * is_sharded,
        },
    ]
    if plan.beta:  # between the policy's forward and backward pass
        moments.append(
            {
                "activations": everything + without_gradients(plan, plan.L),
                "logits": 2 * FLOAT32 * num_logits,
                "gathered weights": root_gathered + gathered,
            }
        )
    return moments


def peak(plan: Plan, moments: list[dict[str, float]]) -> dict[str, float]:
    """Return the terms of the heaviest moment, in bytes per GPU."""
    return resident(plan) | max(moments, key=lambda moment: sum(moment.values()))
