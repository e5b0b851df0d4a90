"""Reward a completion for its form: `<think>…</think><answer>…</answer>`."""

import re

# [\s\S] and no tags inside, so that each text has one reading, found in linear time.
FORM = re.compile(
    r"\s*<think>((?:(?!</?(?:think|answer)>)[\s\S])*)</think>\s*<answer>((?:(?!</?(?:think|answer)>)[\s\S])*)</answer>\s*"
)


def format_reward(completions, assistant, **kwargs) -> list[float]:
    """Return 1 for a completion that thinks and then answers, each in its tags once and nothing beside; else 0.

    The parts may have several lines; an answer of white space alone is none. Arguments: see
    `reward.numerical.numerical_video_reward`.
    """
    found = (FORM.fullmatch(completion[0]["content"]) for completion in completions)
    return [1.0 if match and match.group(2).strip() else 0.0 for match in found]
