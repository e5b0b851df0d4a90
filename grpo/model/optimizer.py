"""The optimizer, and the components of the model: each is frozen, or trained at a learning rate of its own."""

import math
from collections import Counter

import torch
from torch.optim.lr_scheduler import LambdaLR

from grpo.config import Config


def learning_rates(config: Config) -> dict[str, float | None]:
    """Return the peak learning rate of each component, None if it is frozen; some may have no parameters."""
    vision_lr = config.vision_lr or config.learning_rate
    return {
        "language model": None if config.freeze_llm or config.lora_enable else config.learning_rate,
        "adapters of the language model": config.learning_rate,
        "vision tower": None if config.freeze_vision_tower else vision_lr,
        "adapters of the vision tower": vision_lr,
        "merger": None if config.freeze_merger else config.merger_lr or config.learning_rate,
    }


# The beginnings of the parameters' names; the merger first, since it lies within the vision tower's module.
COMPONENTS = {
    "model.visual.merger.": "merger",
    "model.visual.": "vision tower",
    "model.language_model.": "language model",
    "lm_head.": "language model",
}


def component_of(name: str) -> str:
    """Name the component that a parameter belongs to: a key of `learning_rates`; ValueError for an unknown one."""
    for start, component in COMPONENTS.items():
        if name.startswith(start):
            return f"adapters of the {component}" if ".lora_" in name else component
    raise ValueError(f"the parameter {name} belongs to no component: name it in COMPONENTS and learning_rates")


def freeze(model, config: Config) -> None:
    """Set requires_grad on the trained components only; call it before sharding, with the adapters in place."""
    rates = learning_rates(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(rates[component_of(name)] is not None)


def parameter_groups(model, config: Config) -> list[dict]:
    """Group the trained parameters by component, each with its learning rate; weight decay on matrices only."""
    rates, groups = learning_rates(config), {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            component, is_matrix = component_of(name), parameter.ndim >= 2
            group = {"params": [], "lr": rates[component], "weight_decay": config.weight_decay if is_matrix else 0.0}
            groups.setdefault((component, is_matrix), group)["params"].append(parameter)
    return list(groups.values())


def make_optimizer(model, config: Config, total_steps: int):
    """Return AdamW over the `parameter_groups`, and its schedule: linear warm-up, then a cosine to 0."""
    optimizer = torch.optim.AdamW(parameter_groups(model, config), fused=True)
    warmup = math.ceil(config.warmup_ratio * total_steps)

    def share(step: int) -> float:
        if step < warmup:  # not 0 at first: the first step's rollouts cost as much as any other's
            return (step + 1) / (warmup + 1)
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(total_steps - warmup, 1))

    return optimizer, LambdaLR(optimizer, share)


@torch.no_grad()
def init_optimizer_state(optimizer) -> None:
    """Allocate AdamW's states, two more copies of what is trained, which the first step's peak memory would lack.

    By a step with zero gradients; the learning rate or the weight decay must be 0, so that the weights do not change.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def components_table(model, config: Config) -> str:
    """Return a table of the components: parameters, learning rate."""
    sizes, rates = Counter(), learning_rates(config)
    for name, parameter in model.named_parameters():
        sizes[component_of(name)] += parameter.numel()
    lines = [f"{'component':30}{'parameters':>16}{'learning rate':>16}"]
    lines += [f"{name:30}{size:16,}{rates[name] or 'frozen':>16}" for name, size in sizes.items()]
    total, trained = sizes.total(), sum(size for name, size in sizes.items() if rates[name])
    return "\n".join([*lines, f"{'trained in total':30}{trained:16,}   of {total:,} ({trained / total:.1%})"])
