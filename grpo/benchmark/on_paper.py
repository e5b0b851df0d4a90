"""`python -m grpo.benchmark --on_paper`: what a step needs on GPUs that one does not have, computed from sizes alone.

Nothing is built or run. Memory: `memory.py`. Times are lower bounds, which no run reaches.
"""

from data.media.patches import MERGE_SIZE
from grpo.benchmark.memory import disk, host_memory, peak, rollout_moments, update_moments
from grpo.benchmark.sizes import Parameters, Plan


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
