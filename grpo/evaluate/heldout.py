"""Greedy answers on held-out samples, scored by the reward and by their error in points."""

import torch

from data.loader import Prompt
from grpo.model.load import special_tokens
from grpo.rollout import SamplingParams, generate
from reward.extract import extract_number
from reward.numerical import numerical_video_reward


def evaluate(model, tokenizer, prompts: list[Prompt], max_completion_length: int) -> dict[str, float]:
    """Answer every prompt greedily.

    model: unsharded. Returns the mean `reward`, the mean absolute error `mae` of the answers that contain a number (in
    points, where the truth has one) and the share of such answers, `parse_rate`.
    """
    device = next(model.parameters()).device
    tokens, params = special_tokens(model, tokenizer, device), SamplingParams(1, max_completion_length)
    rewards, errors, parsed = [], [], []
    for prompt in prompts:
        (rollout,) = generate(model, [prompt.to(device)], tokens, params)
        text = tokenizer.decode(rollout.completion_ids[0], skip_special_tokens=True)
        answer = prompt.sample.answer
        rewards += numerical_video_reward(
            [[{"role": "assistant", "content": text}]], [{"role": "assistant", "content": answer}]
        )
        truth, predicted = extract_number(answer), extract_number(text)
        parsed.append(predicted is not None)
        if truth is not None and predicted is not None:
            errors.append(abs(truth - predicted))
    mean = {"reward": rewards, "mae": errors or [float("nan")], "parse_rate": parsed}
    return {name: torch.tensor(values, dtype=torch.float64).mean().item() for name, values in mean.items()}
