"""Rewards: text in, one number per completion out. `--reward_funcs` takes the names below, or `file.py:function`.

To give a function of yours a name: put it into a file of this folder, and import it here. It looks like

    def short_answer_reward(completions, assistant, completion_ids, **kwargs):
        return [1.0 if len(ids) <= 20 else 0.0 for ids in completion_ids]

What it is given, and may return and declare, stands in `reward/README.md`.
"""
# ruff: noqa: F401

from reward.concordance import concordance_reward
from reward.form import format_reward
from reward.numerical import numerical_video_reward, smooth_numerical_reward
