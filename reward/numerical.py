"""Reward a completion for how close its number comes to the true one.

    score  = max(0, 1 - (error / error_scale)^2) * (1 + 0.5 * min(|truth - 50| / 30, 1))
    reward = min(1, 0.1 + 0.9 * score)

The second factor is the range emphasis: values far from 50 are rare and matter most. `error_scale` is the error at
which the score reaches 0, so that only the 0.1 for any number remains. With a large scale every guess is rewarded, a
constant answer too, and nothing can be learned. If the truth has no number, every completion gets 0.5; else a
completion without a number gets 0.

A reward function takes `(completions, assistant, **kwargs)`, as functions written for TRL do, and returns a list of
floats.
"""

import fcntl
import json
import os

from reward.extract import extract_number


def numerical_score(truth: float, prediction: float, error_scale: float = 12.0) -> float:
    """Score a prediction: 1 to 1.5 when exact (range emphasis), falling quadratically to 0 at `error_scale`."""
    relative = (prediction - truth) / error_scale
    emphasis = 1 + 0.5 * min(abs(truth - 50) / 30, 1)
    return max(0.0, 1 - relative * relative) * emphasis  # `** 2` would raise where this gives inf


def numerical_video_reward(completions, assistant, **kwargs) -> list[float]:
    """Reward each completion against the true answer beside it.

    completions[i] is `[{"role": "assistant", "content": text}]`,
    assistant[i] is `{"role": "assistant", "content": answer}`.
    kwargs: `error_scale`; for the debug log `step`, `sample_id` (one per completion) and `is_training` (only then is it
    written). Returns rewards from 0 to 1.
    """
    error_scale = kwargs.get("error_scale", 12.0)
    rewards, records = [], []
    sample_ids = kwargs.get("sample_id") or [None] * len(completions)
    for completion, answer, sample_id in zip(completions, assistant, sample_ids, strict=True):
        truth, text = answer["content"], completion[0]["content"]
        truth_number, predicted_number = extract_number(truth), extract_number(text)
        error = None
        if truth_number is None:
            reward = 0.5
        elif predicted_number is None:
            reward = 0.0
        else:
            error = abs(predicted_number - truth_number)
            reward = min(1.0, 0.1 + 0.9 * numerical_score(truth_number, predicted_number, error_scale))
        rewards.append(reward)
        records.append(
            {
                "step": kwargs.get("step"),
                "sample_id": sample_id,
                "truth": truth,
                "text": text,
                "truth_number": truth_number,
                "predicted_number": predicted_number,
                "error": error,
                "reward": reward,
            }
        )
    if kwargs.get("is_training", True):
        append_to_log(records)
    return rewards


def append_to_log(records: list[dict]) -> None:
    """Append one JSON object a line to LOG_PATH, with DEBUG_MODE=true; several processes may do so at once.

    Without records it only opens the file: raises OSError if it cannot be written.
    """
    if os.environ.get("DEBUG_MODE", "").lower() != "true":
        return
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    path = os.environ.get("LOG_PATH") or "grpo_rewards.log"
    with open(path, "ab", buffering=0) as file:  # unbuffered: one write, so that no line is torn
        fcntl.flock(file, fcntl.LOCK_EX)  # held until the file is closed; appending alone is not atomic on NFS
        file.write(lines)
