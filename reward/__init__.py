"""Rewards: text in, one number per completion out. `--reward_funcs` takes these names, or `file.py:function`."""

from reward.concordance import concordance_reward
from reward.form import format_reward
from reward.numerical import numerical_video_reward, smooth_numerical_reward

__all__ = ["numerical_video_reward", "smooth_numerical_reward", "concordance_reward", "format_reward"]
