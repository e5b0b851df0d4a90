"""What a step needs of memory and disk, computed from sizes alone; the letters are those of `sizes.py`.

Memory is that of tensors: CUDA, NCCL and the gaps in the allocator's memory come on top, some GB of each GPU.
`tests/grpo/benchmark/test_on_paper.py` compares with what runs on a CPU really allocate.
"""

from data.media.patches import PATCH_VALUES
from grpo.benchmark.sizes import FLOAT32, Parameters, Plan
from grpo.decoding import MIN_PROMPT_CAPACITY
from grpo.logprobs import PATCHES_PER_PASS, TOKENS_PER_CHUNK


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
