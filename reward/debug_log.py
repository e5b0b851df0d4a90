"""The log of rewards for debugging, LOG_PATH with DEBUG_MODE=true: an object per completion, one a line."""

import fcntl
import json
import os

from reward.extract import extract_number


def log_path() -> str | None:
    """Return the log's file; None unless there is to be one."""
    is_on = os.environ.get("DEBUG_MODE", "").lower() == "true"
    return os.environ.get("LOG_PATH") or "grpo_rewards.log" if is_on else None


def log_rewards(completions, assistant, rewards, /, step=None, sample_id=None, is_training=True, **kwargs) -> None:
    """Append the completions of a training step; several processes may do so at once.

    The arguments are those of a reward function, and the rewards that it gives.
    """
    if not log_path() or not is_training:
        return
    lines, sample_ids = "", sample_id or [None] * len(rewards)
    for name, answer, completion, reward in zip(sample_ids, assistant, completions, rewards, strict=True):
        record = {"step": step, "sample_id": name, "truth": answer["content"], "text": completion[0]["content"]}
        truth, prediction = extract_number(record["truth"]), extract_number(record["text"])
        error = None if truth is None or prediction is None else abs(prediction - truth)
        record |= {"truth_number": truth, "predicted_number": prediction, "error": error, "reward": reward}
        lines += json.dumps(record) + "\n"
    with open(log_path(), "ab", buffering=0) as file:  # unbuffered: one write, so that no line is torn
        fcntl.flock(file, fcntl.LOCK_EX)  # held until the file is closed; appending alone is not atomic on NFS
        file.write(lines.encode())
