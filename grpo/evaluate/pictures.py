"""The pictures that clinical papers show: scatter plot, Bland-Altman, histogram of errors, ROC curves.

Each fits half a page and tells its curves apart in grey, too. Axes are in the unit of the answers ("points" for
percentages). Answers without a valid number are not drawn; the title says how many there are. In ROC curves they count
as the best constant answer, as in the figures.
"""

import numpy as np
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

from grpo.evaluate.metrics import Answers

INK = "#1f4e79"
DOTTED = dict(color="#8a8a8a", linewidth=0.8, linestyle=":")
POINTS = dict(s=14, color=INK, alpha=0.5, linewidth=0)  # through which others show
CURVES = dict(color=["0.15", "0.35", "0.55", "0.75"], linestyle=["-", "--", ":", "-."])  # in turn


def pictures(answers: Answers, figures: dict, cuts: list[float], name: str) -> dict[str, Figure]:
    """Draw all pictures: "scatter", "bland_altman", "errors", and "roc" if there is a cut with truths on both sides.

    figures: of `metrics.figures` for these answers. name: what the title begins with, such as "held-out".
    """
    truths, numbers = answers.truths, answers.valid_numbers  # (n,), (n, N)
    x, y = np.repeat(truths, numbers.shape[1]), numbers.ravel()
    is_valid = ~np.isnan(y)
    missing = f", {(~is_valid).sum()} without a number" * (not is_valid.all())
    each = f" x {numbers.shape[1]} answers" * (numbers.shape[1] > 1)
    title = f"{plain(name)}: {len(truths)} samples{each}{missing}"
    drawn = {
        "scatter": scatter(x[is_valid], y[is_valid], figures, cuts, title),
        "bland_altman": bland_altman(x[is_valid], y[is_valid], figures, title),
        "errors": error_histogram(x[is_valid], y[is_valid], figures, title),
    }
    if cuts := [cut for cut in cuts if f"auc_{cut:g}" in figures]:
        drawn["roc"] = roc(x, np.where(is_valid, y, np.median(truths)), figures, cuts, title)
    return drawn


def scatter(x: np.ndarray, y: np.ndarray, figures: dict, cuts: list[float], title: str) -> Figure:
    """Draw predictions (points,) over truths with the identity line, the cuts, and the main figures."""
    figure, axes = new_axes(title, "true value (points)", "predicted value (points)")
    values = np.concatenate([x, y]) if len(x) else np.array([0.0, 100.0])
    margin = 0.05 * np.ptp(values) or 1.0
    low, high = values.min() - margin, values.max() + margin
    axes.plot([low, high], [low, high], color="black", linewidth=1)
    for cut in cuts:
        axes.axvline(cut, **DOTTED)
        axes.axhline(cut, **DOTTED)
    axes.scatter(x, y, **POINTS)
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    text = "MAE {mae}   (best constant {zero_skill_mae})\nRMSE {rmse}\nR² {r2}   r {pearson}\nCCC {ccc}"
    note(axes, figures, text + "\nsd ratio {sd_ratio}")
    return figure


def bland_altman(x: np.ndarray, y: np.ndarray, figures: dict, title: str) -> Figure:
    """Draw differences over means, with the bias and the 95 % limits of agreement as numbers."""
    figure, axes = new_axes(title, "mean of true and predicted (points)", "predicted - true (points)")
    axes.scatter((x + y) / 2, y - x, **POINTS)
    axes.axhline(0, **DOTTED)
    for key, style, label in (("bias", "-", "bias"), ("limit_high", "--", "+1.96 sd"), ("limit_low", "--", "-1.96 sd")):
        value = figures[key]["value"]
        if value is not None:
            axes.axhline(value, color="black", linewidth=1, linestyle=style)
            right = dict(transform=axes.get_yaxis_transform(), ha="right", va="bottom", fontsize=9)
            axes.text(0.99, value, f"{label} {value:+.1f}", **right)
    axes.margins(y=0.15)
    return figure


def error_histogram(x: np.ndarray, y: np.ndarray, figures: dict, title: str) -> Figure:
    """Draw how often each error occurs."""
    figure, axes = new_axes(title, "predicted - true (points)", "answers")
    errors = y - x
    if len(errors):
        width = max(1.0, np.ceil(np.ptp(errors) / 40))  # whole points, so that no bar catches two values
        first, last = np.floor(errors.min() / width), np.ceil(errors.max() / width)
        axes.hist(errors, bins=(np.arange(first, last + 2) - 0.5) * width, color=INK, edgecolor="white", linewidth=0.5)
    axes.axvline(0, color="black", linewidth=1)
    within = shown(figures["within_5"], ".0%")
    note(axes, figures, f"mean |error| {{mae}}\nmedian |error| {{median_error}}\nbias {{bias}}\nwithin 5: {within}")
    return figure


def roc(x: np.ndarray, y: np.ndarray, figures: dict, cuts: list[float], title: str) -> Figure:
    """Draw the ROC curve of "below the cut" for each cut."""
    figure, axes = new_axes(title, "false positive rate", "true positive rate")
    axes.plot([0, 1], [0, 1], **DOTTED)
    axes.set_prop_cycle(**CURVES)
    for cut in cuts:
        false_positives, true_positives, _ = roc_curve(x < cut, -y)
        area, accuracy = shown(figures[f"auc_{cut:g}"]), shown(figures[f"accuracy_{cut:g}"])
        label = f"below {cut:g}: AUC {area}, accuracy {accuracy}"
        axes.plot(false_positives, true_positives, linewidth=1.8, label=label)
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    axes.legend(loc="lower right", fontsize=9, frameon=False)
    return figure


def new_axes(title: str, xlabel: str, ylabel: str):
    """Make a figure with labelled axes. Figure without pyplot: no windows, no state that grows."""
    figure = Figure(figsize=(5.0, 4.2), dpi=110)
    axes = figure.add_axes((0.13, 0.13, 0.83, 0.78), xlabel=xlabel, ylabel=ylabel)
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def note(axes, figures: dict, text: str) -> None:
    """Write lines, with figures whose names they have in braces, into the upper left corner."""
    text = text.format_map({name: shown(figure) for name, figure in figures.items()})
    box = dict(facecolor="white", alpha=0.75, edgecolor="none", pad=2)
    axes.text(0.02, 0.98, text, transform=axes.transAxes, va="top", fontsize=9, bbox=box)


def shown(figure: dict, form: str = ".2f") -> str:
    """Write a figure as text; "undefined" if it has no value."""
    return "undefined" if figure["value"] is None else format(figure["value"], form)


def plain(text: str) -> str:
    """Keep foreign text from being read as mathematics, from breaking the line, and from filling the page."""
    text = "".join(c if c.isprintable() else " " for c in text).replace("$", r"\$")
    return text if len(text) <= 40 else f"{text[:39]}…"
