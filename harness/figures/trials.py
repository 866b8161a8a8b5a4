"""Trials of a tuning: what was tried, how it scored, what was chosen."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from harness.figures.curves import logarithmic
from harness.figures.style import INK, TEXT_SIZE, colors_of, dress, head, new_figure, place

WIDTH, HEIGHT, GAP = 2.7, 2.1, 0.95  # inches of a panel, and between them
WIDE = 5.0  # ratio of the largest to the smallest value above which an axis is logarithmic


class Tried(NamedTuple):
    """What was tried for one method.

    Attributes:
        trials: Settings of every trial, together with its ``score``.
        chosen: Settings that were chosen.
    """

    trials: Sequence[Mapping[str, Any]]
    chosen: Mapping[str, Any]


def trials_figure(
    methods: Mapping[str, Tried], *, title: str = "Trials", score: str = "score"
) -> Figure:
    """Plot the score of every trial over each numeric setting; what was chosen is ringed.

    Args:
        methods: Method to its trials.
        title: Heading.
        score: What is plotted; after a comma, which way it is better.

    Raises:
        ValueError: No setting is a number.
    """
    names = numeric_settings(methods)
    if not names:
        raise ValueError("no trial has a numeric setting and a score")
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = new_figure(0.75 + columns * (WIDTH + GAP), 0.15 + rows * (HEIGHT + GAP))
    colors = colors_of(methods)
    for position, name in enumerate(names):
        row, column = divmod(position, columns)
        axes = place(figure, 0.75 + column * (WIDTH + GAP),
                     0.5 + (rows - 1 - row) * (HEIGHT + GAP), WIDTH, HEIGHT)  # fmt: skip
        _draw(axes, name, methods, colors, score if column == 0 else "")
    figure.axes[columns - 1].legend(
        loc="upper left", bbox_to_anchor=(1.03, 1.0), frameon=False, fontsize=TEXT_SIZE
    )
    head(figure, title, f"{score}, of every trial; ringed: chosen")
    return figure


def numeric_settings(methods: Mapping[str, Tried]) -> list[str]:
    """Return the settings that are numbers in a trial with a score."""
    found = dict.fromkeys(
        name
        for tried in methods.values()
        for trial in tried.trials
        if _number(trial.get("score"))
        for name in tried.chosen
        if _number(trial.get(name))
    )
    return list(found)


def _draw(
    axes: Axes,
    name: str,
    methods: Mapping[str, Tried],
    colors: Mapping[str, str],
    score: str,
) -> None:
    every: list[tuple[float, float]] = []
    for method, tried in methods.items():
        known = [t for t in tried.trials if _number(t.get(name)) and _number(t.get("score"))]
        points = [(float(t[name]), float(t["score"])) for t in known]
        every += points
        axes.scatter([x for x, _ in points], [y for _, y in points], s=22, color=colors[method],
                     alpha=0.8, linewidths=0, label=method)  # fmt: skip
        best = [p for p, t in zip(points, known, strict=True) if _is_chosen(t, tried.chosen)]
        axes.scatter([x for x, _ in best], [y for _, y in best], s=70, facecolors="none",
                     edgecolors=INK, linewidths=1.2)  # fmt: skip
    if every and _spread([x for x, _ in every]) > WIDE:
        logarithmic(axes, axes.xaxis)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4))
    if every and _spread([y for _, y in every]) > WIDE:
        logarithmic(axes)
    dress(axes, x=name, y=score.partition(",")[0])


def _is_chosen(trial: Mapping[str, Any], chosen: Mapping[str, Any]) -> bool:
    return all(trial.get(name) == value for name, value in chosen.items())


def _spread(values: Sequence[float]) -> float:
    return max(values) / min(values) if min(values) > 0 else 0.0


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
