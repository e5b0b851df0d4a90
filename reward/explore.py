"""See a reward before training with it: where it is flat, and how many groups of answers it cannot tell apart.

    python -m reward.explore --truths train.json --reward_funcs smooth_numerical_reward --output reward.png

The picture shows each reward against the error, at five truths, and the share of groups whose rewards are all equal, so
that they teach nothing. The table has the same in numbers: the errors over which the reward does not change, and that
share for policies that answer

    truth + bias + spread * normal      rounded to a whole percent, clipped to --valid_range

It is the sum over rewards r of P(reward = r) ^ num_generations, averaged over the truths. A function is given truths
and answers as "55%", and no other keys of the samples: one that judges something else or a whole step cannot be drawn.

--truths takes a file of samples as train.py does, a JSON list of numbers or answers, or a text with one a line. Entries
without a number are left out. Without the flag, the shares are those of the five truths of the picture: a first look,
since they depend on the data.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.special import ndtr

from data.dataset import Entries
from data.entry import read_sample
from data.flags import parse_flags
from data.sample import InputError, Sample, first_line, writing
from reward.extract import extract_number
from reward.flags import Bounds, JudgeFlags, flag
from reward.functions import RewardError, RewardFunction, load_reward_functions, score_answers

PROG = "python -m reward.explore"
PLACES = np.array([0.20, 0.35, 0.50, 0.65, 0.80])  # of the truths that are drawn, in the valid range
NUM_STEPS = 1000  # of the curves, over the valid range: 0.1 points, if it is 0 to 100
BIASES, SPREADS = np.array([0, 5, 10, 20]), np.array([1, 3, 6, 12])  # of the policies, in points
WHOLE = np.arange(-80, 101)  # whole answers around a truth: others have a probability below 1e-10
MOST_TRUTHS = 500  # of more in the file, an even choice; the shares are good to half a percent
LINES = [("-", "black", 1.6), ("--", "#1f4e79", 1.6), ("-", "#e3a08f", 3), ("-.", "#5dade2", 1.6), (":", "#f0932b", 2)]


@dataclass
class ExploreConfig(JudgeFlags):
    """The flags; those of `train.py` have its meaning."""

    heading = "what"
    reward_funcs: list[str] = flag(
        ["numerical_video_reward", "smooth_numerical_reward"], "names in reward/, or file.py:function"
    )
    truths: str = flag("", "file of samples, numbers or answers (the five truths of the picture)")
    num_generations: int = flag(8, "completions of a group", Bounds(lambda n: n >= 2, "give at least 2"))
    output: str = flag("reward.png", "PNG file of the picture, replaced if it exists")


def explore(function: RewardFunction, shown: np.ndarray, truths: np.ndarray, args: ExploreConfig) -> tuple:
    """Return the curves at the truths shown, (5,), and the share of groups of equal rewards over truths (n,).

    The share is (biases, spreads). Raises RewardError if the reward fails or cannot be drawn.
    """
    curves = [curve(function, truth, args.valid_range) for truth in shown]
    if len(np.unique(np.concatenate([rewards for _, rewards in curves]))) == 1:
        raise RewardError(
            f"--reward_funcs {function.name}: all numbers have the same reward, so it judges something else, or a "
            "whole step, and cannot be drawn: leave it out"
        )
    places = np.linspace(0, len(truths) - 1, min(len(truths), MOST_TRUTHS)).round().astype(int)
    distinct, counts = np.unique(np.sort(truths)[places], return_counts=True)  # (T,)
    shares = []
    for truth in distinct:
        answers, probabilities = policies(truth, args.valid_range)
        shares.append(equal_share(rewards_of(function, truth, answers), probabilities, args.num_generations))
    return curves, np.average(shares, axis=0, weights=counts)


def rewards_of(function: RewardFunction, truth: float, answers: np.ndarray) -> np.ndarray:
    """Return the rewards of answers (A,) to one truth, float32 as in training; nan where the function has no say."""
    distinct, place = np.unique(answers, return_inverse=True)
    truth, *texts = (np.format_float_positional(number, trim="-") + "%" for number in (truth, *distinct))
    samples = [Sample(f"answer {text}, truth {truth}", (), (("user", "EF?"),), truth) for text in texts]
    return score_answers([function], samples, texts, []).astype(np.float32)[place]


def curve(function: RewardFunction, truth: float, valid_range: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return the errors (n,) that predictions in the valid range can have, in points, and the rewards (n,) there."""
    low, high = valid_range
    errors = (np.arange(-NUM_STEPS, NUM_STEPS + 1) * (high - low) / NUM_STEPS).round(9)
    predictions = (truth + errors).round(9)
    inside = (low <= predictions) & (predictions <= high)
    return errors[inside], rewards_of(function, truth, predictions[inside])


def flat_parts(rewards: np.ndarray) -> np.ndarray:
    """Return the first and the last index of each part of rewards (n,) that is the same throughout: (parts, 2)."""
    before, after = rewards[:-1], rewards[1:]
    same = (before == after) | (np.isnan(before) & np.isnan(after))
    return np.flatnonzero(np.diff(np.concatenate([[0], same, [0]]))).reshape(-1, 2)


def policies(truth: float, valid_range: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return what the policies answer to a truth, (A,), each with its probabilities, (A, biases, spreads)."""
    whole = np.round(truth) + WHOLE
    edges = np.append(whole, whole[-1] + 1)[:, None, None] - 0.5 - truth  # of what is rounded to each
    below = ndtr((edges - BIASES[:, None]) / SPREADS)  # (A + 1, biases, spreads)
    return whole.clip(*valid_range), np.diff(below, axis=0)


def equal_share(rewards: np.ndarray, probabilities: np.ndarray, num_generations: int) -> np.ndarray:
    """Return the probability that all rewards of a group are equal: (…).

    rewards: (A,) of the possible answers; probabilities: (A, …). As in the trainer, a completion without a say (nan)
    does not count in its group, and a group without any teaches nothing, either.
    """
    n, none = num_generations, probabilities[np.isnan(rewards)].sum(axis=0)
    of_value = [probabilities[rewards == value].sum(axis=0) for value in np.unique(rewards[~np.isnan(rewards)])]
    return none**n + sum((none + probability) ** n - none**n for probability in of_value)


def table(found: dict, shown: np.ndarray, num_generations: int) -> str:
    """Write the flat parts and the shares of each reward."""
    lines = []
    for name, (curves, equal) in found.items():
        lines += ["", f"{name} does not change at errors (points)"]
        for truth, (errors, rewards) in zip(shown, curves, strict=True):
            flat = [f"{first:g} to {last:g}" for first, last in errors[flat_parts(rewards)]]
            lines.append(f"    truth {truth:<12g}{', '.join(flat) or 'nowhere'}")
        lines.append(f"groups of {num_generations} with equal rewards")
        lines.append(" " * 18 + "".join(f"{f'spread {spread}':>11}" for spread in SPREADS))
        rows = zip(BIASES, equal, strict=True)
        lines += [f"    bias {bias:<9}" + "".join(f"{share:>11.0%}" for share in row) for bias, row in rows]
    return "\n".join(lines)


def draw(found: dict, shown: np.ndarray, num_generations: int, whose: str) -> Figure:
    """Draw a row per reward function: its curves, and the shares of equal groups; whose: truths those are of."""
    figure = Figure(figsize=(11, 4.2 * len(found)), dpi=110, layout="constrained")
    rows = figure.subplots(len(found), 2, width_ratios=[1.7, 1], squeeze=False)
    for (name, (curves, equal)), (left, right) in zip(found.items(), rows, strict=True):
        band = dict(color="#607d8b", alpha=0.2, linewidth=9, solid_capstyle="butt", zorder=1)
        for truth, (errors, rewards), (style, color, width) in zip(shown, curves, LINES, strict=True):
            for ends in flat_parts(rewards):
                left.plot(errors[ends], rewards[ends], **band)
            left.plot(errors, rewards, style, color=color, linewidth=width, label=f"truth {truth:g}")
        left.plot([], [], **band, label="flat (darker:\nat more truths)")
        left.set(title=name, xlabel="prediction - truth (points)", ylabel="reward")
        left.legend(fontsize=9, frameon=False)
        left.spines[["top", "right"]].set_visible(False)
        right.imshow(equal, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for (i, j), share in np.ndenumerate(equal):
            right.text(j, i, f"{share:.0%}", ha="center", va="center", color="white" if share > 0.6 else "black")
        right.set(xticks=range(len(SPREADS)), xticklabels=SPREADS, yticks=range(len(BIASES)), yticklabels=BIASES)
        right.set(xlabel="spread of the answers (points)", ylabel="bias of the answers (points)")
        right.set_title(f"groups of {num_generations} with equal rewards\n({whose})", fontsize=10)
    return figure


def read_truths(path: str) -> tuple[np.ndarray, int]:
    """Return the numbers (n,) that a file's answers have, and how many have none; raise InputError."""
    mend = "name a file of samples or numbers"
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputError(f"--truths {path!r} cannot be read ({first_line(error)}): {mend}") from error
    entries = Entries(path) if text.lstrip().startswith(("[", "{")) else filter(str.strip, text.split("\n"))
    answers = [
        read_sample(entry, path, f"#{place + 1}", "").answer if isinstance(entry, dict) else str(entry)
        for place, entry in enumerate(entries)
    ]
    numbers = [number for answer in answers if (number := extract_number(answer)) is not None]
    if not numbers:
        raise InputError(f"--truths {path!r}: no number in {len(answers)} entries: {mend}")
    return np.array(numbers), len(answers) - len(numbers)


def main(argv: list[str]) -> int:
    """Print the table and write the picture; return 0, or 2 for what the user can mend, which one line says."""
    try:
        args = parse_flags(ExploreConfig, argv, PROG, description=__doc__)
        functions = load_reward_functions(args.reward_funcs, [], args.reward_kwargs, args.valid_range)
        shown = args.valid_range[0] + np.diff(args.valid_range) * PLACES
        truths, left_out = read_truths(args.truths) if args.truths else (shown, 0)
        found = {function.name: explore(function, shown, truths, args) for function in functions}
        whose = f"{len(truths)} truths" if args.truths else "the five truths: no --truths"
        numbers = f"{truths.min():g} to {truths.max():g}, median {np.median(truths):g}"
        print(f"{whose}, {numbers}" + (f"; {left_out} without a number left out" if left_out else ""))
        print(table(found, shown, args.num_generations))
        figure = draw(found, shown, args.num_generations, whose)
        with writing("output", args.output):
            figure.savefig(args.output, format="png")
        print(f"\nthe picture is in {args.output!r}")
        return 0
    except (InputError, RewardError) as error:
        print(f"{getattr(error, 'details', '')}{PROG}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
