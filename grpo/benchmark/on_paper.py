"""`python -m grpo.benchmark --on_paper`: what a step needs on GPUs that one does not have, computed from sizes alone.

Nothing is built or run. Memory is that of tensors: CUDA, NCCL and the gaps in the allocator's memory come on top, some
GB of each GPU. `tests/grpo/benchmark/test_on_paper.py` compares with what runs on a CPU really allocate; times are
lower bounds, which no run reaches.

| P | prompt tokens | S | patches of its videos | G | completions | C | tokens of each | L | tokens of the packed row |
| V | vocabulary | E | hidden size | MLP | its inner size | K | size of a token's keys | W, J | E and MLP of the tower |
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
    E, K, MLP = plan.text.hidden_size, plan.K, plan.text.intermediate_size
    norm = 1 if plan.gpus else 2  # the input; on a CPU, where the norm is not one kernel, also the normalised input
    attention = tokens * (norm * E + E + 2 * K) + plan.G * (plan.P + plan.C) * 2 * K  # the prompt's, per completion
    attention += queries * 3 * E  # queries, and what is attended to, before and after groups are joined to a row
    mlp = queries * (norm * E + E + 4 * MLP)  # gate, silu(gate), up, their product
    if plan.lora_rank:  # frozen matrices do not need their inputs; adapters need each one's own, behind dropout
        copies = 1 + (1 / plan.bytes if plan.gpus else 1)  # and the mask: a byte, on a CPU a number
        attention += copies * E * (2 * tokens + 2 * queries) - E * (tokens + queries)
        mlp += queries * (copies * (2 * E + MLP) - E - MLP)
        mlp += queries * 7 * plan.lora_rank
    return plan.bytes * (attention + mlp)


def block_activations(plan: Plan, patches: int) -> float:
    """Return what a block of the vision tower keeps: as in a layer, but keys are as many as queries, in one tensor."""
    W, J, norm = plan.vision.hidden_size, plan.vision.intermediate_size, 1 if plan.gpus else 2
    return plan.bytes * patches * (2 * (norm + 1) * W + 6 * W + 4 * J)


def patches_in_pass(plan: Plan) -> int:
    """Return how many patches pass through an unsharded tower at a time: those of as many whole videos as fit."""
    fitting = PATCHES_PER_PASS["cuda" if plan.gpus else "cpu"] // plan.patches_per_video
    return min(plan.S, max(1, fitting) * plan.patches_per_video)


def kept(plan: Plan, checkpointing: bool) -> dict[str, float]:
    """Return what is kept for the backward pass of text and vision, and what one layer or block needs in its own."""
    E, W, L, layers = plan.text.hidden_size, plan.vision.hidden_size, plan.L, plan.text.num_hidden_layers
    queries = 1 + plan.G * plan.C  # of the last layer
    in_pass = plan.S if plan.gpus else patches_in_pass(plan)  # with FSDP there is only one
    layer, block = layer_activations(plan, L, L), block_activations(plan, 1)  # of a patch
    if checkpointing:  # the input of each
        text, vision = layers * L * E * plan.bytes, plan.vision.depth * plan.S * W * plan.bytes
    else:
        text, vision = (layers - 1) * layer + layer_activations(plan, L, queries), plan.vision.depth * plan.S * block
    # The merger keeps in- and output of its norm, and of its gelu; the tower its pixels.
    merger = (4 if plan.gpus else 5) * plan.S * W * plan.bytes
    tower = vision + PATCH_VALUES * plan.S * plan.bytes if plan.trains_tower else 0
    return {
        "text": text + queries * E * plan.bytes,  # and the last hidden states
        "vision": merger + tower,
        # On the way back there are two gradients of an MLP's tensors more than are freed, and those of in- and output.
        "layer": layer + 2 * L * (E + plan.text.intermediate_size) * plan.bytes,
        "block": in_pass * (block + 2 * (W + plan.vision.intermediate_size) * plan.bytes) * plan.trains_tower,
    }


def without_gradients(plan: Plan, tokens: int, patches: int) -> float:
    """Return the activations of a pass that keeps nothing: of text, or of so many patches at a time."""
    E, MLP = plan.text.hidden_size, plan.text.intermediate_size
    W, J = plan.vision.hidden_size, plan.vision.intermediate_size
    text = tokens * (2 * E + 3 * MLP) * plan.bytes  # residual stream, norm, and three tensors of an MLP
    tower = patches * (2 * W + 3 * J + PATCH_VALUES) * plan.bytes  # the same, and the pixels
    normalise = patches * PATCH_VALUES * 2 * FLOAT32  # pixels, before and after
    return max(text, PATCH_VALUES * plan.S + max(tower, normalise))  # all videos' pixels in a row of bytes


def rollout_moments(plan: Plan) -> list[dict[str, float]]:
    """Return what the heaviest moments of a rollout need beside what is `resident`, in bytes per GPU."""
    p = Parameters.of(plan)
    _, trained, _ = p.counts(plan)
    gradients = {"gradients": FLOAT32 * trained / plan.shards}  # those of the step before, until the update
    # FSDP gathers a group into one buffer and copies the weights out of it.
    sync = {"gathered weights": 2 * plan.bytes * p.root(plan) if plan.gpus else 0}
    encode_and_prefill = {"activations": without_gradients(plan, plan.P, patches_in_pass(plan))}
    return [gradients | moment for moment in (sync, encode_and_prefill)]


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
                "activations": everything
                + without_gradients(plan, plan.L, plan.S if plan.gpus else patches_in_pass(plan)),
                "logits": 2 * FLOAT32 * num_logits,
                "gathered weights": root_gathered + gathered,
            }
        )
    return moments


def peak(plan: Plan, moments: list[dict[str, float]]) -> dict[str, float]:
    """Return the terms of the heaviest moment, in bytes per GPU."""
    return resident(plan) | max(moments, key=lambda moment: sum(moment.values()))


def host_memory(plan: Plan) -> float:
    """Return the bytes of a node's memory while rank 0 reads the weights; later there are prompts only."""
    total, _, _ = Parameters.of(plan).counts(plan)
    return FLOAT32 * total  # for all ranks, which get their shards from it


def disk(plan: Plan) -> tuple[float, float]:
    """Return the bytes of a saved model, or of its adapters and what else is trained, and of a checkpoint."""
    total, trained, _ = Parameters.of(plan).counts(plan)
    model = FLOAT32 * trained if plan.lora_rank else plan.bytes * total
    return model, model + 3 * FLOAT32 * trained  # with weights and optimizer in float32, the model among them


def decode_bytes(plan: Plan) -> float:
    """Return what decoding reads for one token of all completions: layers, head, keys and values."""
    p, layers = Parameters.of(plan), plan.text.num_hidden_layers
    read = plan.P + plan.G * plan.C / 2  # tokens whose keys and values are read; completions are half done on average
    return plan.bytes * (layers * p.layer + (p.head or p.embedding) + 2 * layers * plan.K * read)


def operations(plan: Plan, tokens: int, predictions: int) -> tuple[float, float]:
    """Return the operations of a forward pass, of text and vision: 2 per weight and row. Attention is not counted."""
    p, layers = Parameters.of(plan), plan.text.num_hidden_layers
    text = 2 * (layers * (p.layer + p.adapters) * tokens + (p.head or p.embedding) * predictions)
    vision = 2 * (plan.vision.depth * p.block + p.patch_embed) * plan.S
    return text, vision


def update_operations(plan: Plan, checkpointing: bool) -> float:
    """Return the operations of an update."""
    text, vision = operations(plan, plan.L, plan.G * plan.C)
    merger = 2 * Parameters.of(plan).merger * plan.S // MERGE_SIZE**2
    # A backward pass is twice a forward pass: gradients of inputs, and of weights where they are trained.
    work = (2 if plan.lora_rank else 3) * text + 3 * plan.trains_tower * vision + 3 * merger
    again = checkpointing + (plan.beta > 0)  # forward passes once more: of layers that kept nothing, of the reference
    return work + again * (text + vision * plan.trains_tower)


def seconds(plan: Plan, bandwidth: float, flops: float) -> dict[str, float]:
    """Return the least seconds of each part of a step; bandwidth: bytes per second; flops: operations per second.

    Not counted: all-gathers, attention, the optimizer, and everything that is not a matrix product.
    """
    prefill = sum(operations(plan, plan.P, 1))
    decode = max(decode_bytes(plan) / bandwidth, operations(plan, plan.G, plan.G)[0] / flops)
    return {
        "rollout": prefill / flops + (plan.C - 1) * decode,
        "update": update_operations(plan, True) / flops,
        "update without checkpointing": update_operations(plan, False) / flops,
    }


COLUMNS = ("rollout", "update", "update without checkpointing")
TERMS = (
    *("weights", "gradients", "Adam", "sampling copy", "reference model", "key-value cache", "pixels"),
    *("gathered weights", "reduction", "activations", "logits"),
)


def on_paper(options) -> dict:
    """Compute everything; return figures in GB (2**30 bytes) and seconds."""
    plan, GB = Plan.of(options), 2**30
    moments = rollout_moments(plan), update_moments(plan, checkpointing=True), update_moments(plan, checkpointing=False)
    peaks = [peak(plan, of_column) for of_column in moments]
    model, checkpoint = disk(plan)
    return {
        "prompt_tokens": plan.P,
        "patches": plan.S,
        "memory_gb": {
            column: {term: terms.get(term, 0) / GB for term in TERMS} | {"total": sum(terms.values()) / GB}
            for column, terms in zip(COLUMNS, peaks, strict=True)
        },
        "host_memory_gb": host_memory(plan) / GB,
        "disk_gb": {"model": model / GB, "checkpoint": checkpoint / GB},
        "seconds": seconds(plan, options.bandwidth_gb_per_second * 1e9, options.tflop_per_second * 1e12),
    }


def paper_table(options, figures: dict) -> str:
    """Return the figures as a table, and as a row of Markdown."""
    memory, least, disk_gb = figures["memory_gb"], figures["seconds"], figures["disk_gb"]
    where = f"GB per GPU, of {options.gpus}" if options.gpus else "GB, on a CPU"
    lines = [f"prompt: {figures['prompt_tokens']:,} tokens, {figures['patches']:,} patches"]
    lines += ["computed, not measured".ljust(36) + "".join(f"{name:>12}" for name in ("rollout", "update", "update"))]
    lines += [f"{where:36}{'':12}{'checkpoints':>12}{'without':>12}"]
    for term in (*TERMS, "total"):
        lines.append(f"{term:36}" + "".join(f"{memory[column][term]:12.2f}" for column in COLUMNS))
    lines.append(f"{'seconds, at least':36}" + "".join(f"{least[column]:12.2f}" for column in COLUMNS))
    lines.append(f"host: {figures['host_memory_gb']:.1f} GB while the weights are read, for all ranks of a node")
    lines.append(f"disk: {disk_gb['model']:.1f} GB for a model, {disk_gb['checkpoint']:.1f} GB for a checkpoint")
    cells = [options.size, f"{options.resolution}x{options.resolution}", f"{figures['prompt_tokens']:,}"]
    cells += [f"{memory[column]['total']:.0f} GB" for column in COLUMNS]
    cells += [f"{figures['host_memory_gb']:.0f} GB", f"{disk_gb['model']:.0f} GB", f"{disk_gb['checkpoint']:.0f} GB"]
    cells += [f"{least['rollout']:.1f} s", f"{least['update']:.2f} s"]
    return "\n".join([*lines, "", MARKDOWN, "|---" * len(cells) + "|", f"| {' | '.join(cells)} |"])


MARKDOWN = (
    "| model | frames | prompt tokens | rollout | update | without checkpointing | host | model | checkpoint "
    "| rollout at least | update at least |"
)
