"""What is trained, and how: the parts of the model, each frozen or at a learning rate of its own, and AdamW."""

import math

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from grpo.config import Config


def learning_rates(config: Config) -> dict[str, float | None]:
    """Return the peak learning rate of each part; None: the part is frozen. Parts without parameters are listed too."""
    vision_lr = config.learning_rate if config.vision_lr is None else config.vision_lr
    merger_lr = config.learning_rate if config.merger_lr is None else config.merger_lr
    return {
        "language model": None if config.freeze_llm or config.lora_enable else config.learning_rate,
        "adapters of the language model": config.learning_rate,
        "vision tower": None if config.freeze_vision_tower else vision_lr,
        "adapters of the vision tower": vision_lr,
        "merger": None if config.freeze_merger else merger_lr,
    }


def part_of(name: str) -> str:
    """Name the part that a parameter belongs to: a key of `learning_rates`."""
    part = "merger" if "visual.merger." in name else "vision tower" if "visual." in name else "language model"
    return f"adapters of the {part}" if ".lora_" in name else part


def freeze(model, config: Config) -> None:
    """Let gradients flow to the trained parts alone; do it before sharding, with the adapters in place."""
    rates = learning_rates(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(rates[part_of(name)] is not None)


def parameter_groups(model, config: Config) -> list[dict]:
    """Group the trained parameters for the optimizer: by part, each with its learning rate; only matrices decay."""
    groups = []
    for part, lr in learning_rates(config).items():
        own = [p for name, p in model.named_parameters() if part_of(name) == part and p.requires_grad]
        matrices, vectors = [p for p in own if p.ndim >= 2], [p for p in own if p.ndim < 2]
        for parameters, decay in ((matrices, config.weight_decay), (vectors, 0.0)):
            if parameters:
                groups.append({"name": part, "params": parameters, "lr": lr, "weight_decay": decay})
    return groups


def make_optimizer(model, config: Config, total_steps: int):
    """AdamW, each part at its own learning rate, weight decay on matrices alone; warm-up, then a cosine to 0."""
    optimizer = torch.optim.AdamW(parameter_groups(model, config), fused=True)
    warmup = math.ceil(config.warmup_ratio * total_steps)
    # The first step already moves: its rollouts cost as much as any.
    rise = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=max(warmup, 1))
    fall = CosineAnnealingLR(optimizer, T_max=max(total_steps - warmup, 1))
    return optimizer, SequentialLR(optimizer, [rise, fall], milestones=[warmup])


@torch.no_grad()
def make_states(optimizer) -> None:
    """Let AdamW make its states, two more copies of what is trained, by a step with gradients of 0.

    Else its first step makes them after the backward pass, whose peak of memory would lack them. The learning rate or
    the weight decay must be 0, so that the weights stay as they are.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def table_of_parts(model, config: Config) -> str:
    """Show what is trained: part, parameters, trained or not, learning rate."""
    sizes = {}
    for name, parameter in model.named_parameters():
        sizes[part_of(name)] = sizes.get(part_of(name), 0) + parameter.numel()
    lines = [f"{'part':30} {'parameters':>15}   trained   learning rate"]
    rates = learning_rates(config)
    for part, size in sizes.items():
        rate = "no                    -" if rates[part] is None else f"yes {rates[part]:>19g}"
        lines.append(f"{part:30} {size:15,}   {rate}")
    total, trained = sum(sizes.values()), sum(size for part, size in sizes.items() if rates[part] is not None)
    return "\n".join([*lines, f"{'trained in all':30} {trained:15,}   of {total:,} ({trained / total:.1%})"])
