"""How a flag is declared, and the flags about rewards.

The flags of a command are a dataclass, a field each. Its bases are the sections of its --help, so that commands share
flags by sharing bases; `data/flags.py` reads them from the command line. Everything about a flag stands in the line
that declares it.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


class Bounds(NamedTuple):
    """Which values a flag may have."""

    holds: Callable[[object], bool]
    text: str  # what a value must be, for the line that refuses another


POSITIVE = Bounds(lambda x: 0 < x <= 1e9, "must be above 0, and at most 1e9")
NOT_NEGATIVE = Bounds(lambda x: 0 <= x <= 1e9, "must lie between 0 and 1e9")
SHARE = Bounds(lambda x: 0 < x <= 1, "must be above 0, and at most 1")
NAMED = Bounds(bool, "must be given (--help explains the flags)")
BELOW_1 = Bounds(lambda x: 0 <= x < 1, "must be 0 or more, and below 1")
UP_TO_1 = Bounds(lambda x: 0 <= x <= 1, "must lie between 0 and 1")
RANGE = Bounds(
    lambda x: len(x) == 2 and -math.inf < x[0] < x[1] < math.inf, "give the lowest and the highest, as in 0 100"
)


def flag(
    default,
    help: str,
    bounds: Bounds | None = None,
    demo=None,
    may_change: bool = False,
    decides: bool = False,
    alias: str | None = None,
):
    """Declare a flag; its default may be a list.

    demo: the default with --demo. may_change: a resumed run may have another value. decides: the answers of an
    evaluation depend on it, so that one with another value is not continued. alias: a second name.
    """
    described = {"help": help, "bounds": bounds, "demo": demo, "may_change": may_change, "decides": decides}
    described["aliases"] = [alias] if alias else []
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=described)
    return dataclasses.field(default=default, metadata=described)


@dataclass
class JudgeFlags:
    """Which functions judge an answer."""

    heading = "rewards (reward/README.md)"
    reward_funcs: list[str] = flag(
        ["numerical_video_reward"], "names in reward/, or file.py:function", demo=["smooth_numerical_reward"]
    )
    reward_kwargs: str = flag("", "JSON object of arguments for the functions that take them: '{\"error_scale\": 8}'")
    valid_range: list[float] = flag([0.0, 100.0], "lowest and highest answer; others count as no number", RANGE)


@dataclass
class WeightedFlags(JudgeFlags):
    """How their rewards are added up."""

    reward_weights: list[float] = flag([], "weight of each reward function (1 each); 0: only a curve")


@dataclass
class RewardFlags(WeightedFlags):
    """All about rewards."""

    reward_timeout: float = flag(
        600.0,
        "seconds that a reward function may take for a step's completions",
        Bounds(lambda x: 0 < x <= 1500, "must be above 0, and at most 1500 seconds"),  # other ranks wait meanwhile
        may_change=True,
    )
