"""Call reward functions the way TRL does, and name whoever fails."""

import traceback

import torch
from torch import Tensor

from data.dataset import InputError
from grpo.rollout import Rollout


def score(functions: list, rollouts: list[Rollout], texts: list[str], step: int) -> dict[str, Tensor]:
    """Apply every reward function to all completions of this rank; texts: B·G.

    Returns {function name: (B, G)}, nan where a function gives None. Raises InputError that names function and sample.
    """
    B, G = len(rollouts), len(texts) // len(rollouts)
    samples = [rollout.prompt.sample for rollout in rollouts for _ in range(G)]
    columns = {
        "prompts": [[{"role": role, "content": text} for role, text in sample.turns] for sample in samples],
        "completions": [[{"role": "assistant", "content": text}] for text in texts],
        "assistant": [{"role": "assistant", "content": sample.answer} for sample in samples],
        "sample_id": [sample.id for sample in samples],
    }
    return {function.__name__: call_reward(function, columns, step).view(B, G) for function in functions}


def call_reward(function, columns: dict[str, list], step: int) -> Tensor:
    """Return the rewards of one function, (completions,)."""
    try:
        rewards = [float("nan") if reward is None else float(reward) for reward in function(**columns, step=step)]
    except Exception as error:
        traceback.print_exc()  # the function is the user's own: they will want to see where
        what = str(error).splitlines()[0] if str(error) else ""
        raise InputError(
            f"reward function {function.__name__} raised {type(error).__name__} ({what}) for sample "
            f"{culprit(function, columns, step)!r}: mend the function or the sample"
        ) from error
    if len(rewards) != len(columns["completions"]):
        raise InputError(
            f"reward function {function.__name__} gave {len(rewards)} rewards for {len(columns['completions'])} "
            f"completions, the first of sample {columns['sample_id'][0]!r}: it must give one each"
        )
    return torch.tensor(rewards)


def culprit(function, columns: dict[str, list], step: int) -> str:
    """Find the first sample at which a reward function fails when it gets one completion at a time."""
    for i, sample_id in enumerate(columns["sample_id"]):
        try:
            list(function(**{name: [values[i]] for name, values in columns.items()}, step=step))
        except Exception:
            return sample_id
    return columns["sample_id"][0]
