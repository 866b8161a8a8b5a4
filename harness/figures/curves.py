"""Curves of training runs and of trials."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from harness.figures.style import (
    INCHES_PER_LETTER,
    INK,
    PALETTE,
    TEXT_SIZE,
    colors_of,
    dress,
    head,
    new_figure,
    place,
    width_of_head,
)

MOST_POINTS = 200  # of a line; more are averaged in groups
MOST_PANELS = 6
WIDTH, HEIGHT, GAP = 3.3, 2.0, 0.95  # inches of a panel, and between rows of them
LINE = 0.2  # inches between the names of lines
BOLD = 1.15  # letters of bold text over those of normal text
DASHES = {"train": (0, (1.2, 1.2))}  # other parts are solid


class Curve(NamedTuple):
    """What was logged of one metric.

    Attributes:
        steps: (T,) optimizer steps.
        values: (T,), NaN where it was not finite.
    """

    steps: np.ndarray
    values: np.ndarray


def read_metrics(path: Path) -> dict[str, Curve]:
    """Read a ``metrics.csv``: metric to curve, in the order of the columns.

    Args:
        path: The file; a column ``step`` and one a metric, empty where it was not logged.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in (rows[0] if rows else ()) if name not in ("step", "epoch")]
    curves = {}
    for name in names:
        pairs = [(float(row["step"]), float(row[name])) for row in rows if row[name]]
        if pairs:
            curves[name] = Curve(*np.array(pairs).T)
    return curves


def learning_figure(
    runs: Mapping[str, Sequence[Mapping[str, Curve]]],
    *,
    metrics: Sequence[str] = (),
    title: str = "Learning curves",
) -> Figure:
    """Plot what training logged, one panel per metric; ``train/loss`` and ``val/loss`` share one.

    Every training run has its own line, in the color of its name; those of ``train/`` are dotted.

    Args:
        runs: Name, such as a method, to the metrics of its training runs, one a seed, by
            `read_metrics`. A single training may have an empty name.
        metrics: Panels, names without the part before ``/``; by default the first six, losses
            before all others.
        title: Heading.

    Raises:
        ValueError: No training logged one of the metrics.
    """
    stems = dict.fromkeys(
        _stem(name) for many in runs.values() for curves in many for name in curves
    )
    chosen = [stem for stem in metrics or sorted(stems, key=lambda s: s != "loss") if stem in stems]
    if not chosen:
        raise ValueError(f"no training logged {', '.join(metrics) or 'a metric'}")
    shown = chosen if metrics else chosen[:MOST_PANELS]
    left_out = len(chosen) - len(shown)
    parts = {
        name.rpartition("/")[0] for many in runs.values() for curves in many for name in curves
    }
    notes = ["dotted: training batches"] if "train" in parts else []
    notes += [f"{left_out} more in metrics.csv"] if left_out else []
    note = "; ".join(notes)
    longest = max(len(f"{name} {part}".strip()) for name in runs for part in parts)
    column = 0.65 + WIDTH + 0.25 + BOLD * INCHES_PER_LETTER * (longest + len("  0.00001"))
    tall = max(HEIGHT, LINE * len(runs) * len(parts))  # room for the name of every line
    columns = min(2, len(shown))
    rows = -(-len(shown) // columns)
    width = max(columns * column, width_of_head(title, note))
    figure = new_figure(width, 0.55 + rows * (tall + GAP))
    colors = colors_of(runs)
    for position, stem in enumerate(shown):
        row, k = divmod(position, columns)
        bottom = (rows - 1 - row) * (tall + GAP) + 0.5
        axes = place(figure, 0.65 + k * column, bottom, WIDTH, tall)
        _draw_metric(axes, stem, runs, colors)
    head(figure, title, note)
    return figure


def draw_seeds(axes: Axes, x: np.ndarray, values: np.ndarray, color: str) -> float:
    """Draw the median over seeds as a line and their range as a band.

    Args:
        axes: Where.
        x: (T,).
        values: (T,) or (S, T); those that are not finite leave a gap.
        color: Of both.

    Returns:
        Where the line ends, the median of its last tenth; NaN without a finite value.
    """
    seeds = np.where(np.isfinite(values), values, np.nan).reshape(-1, np.shape(values)[-1])
    middle = np.median(seeds, axis=0)
    axes.plot(x, middle, color=color, linewidth=1.6, solid_joinstyle="round")
    if len(seeds) > 1:
        axes.fill_between(x, seeds.min(0), seeds.max(0), color=color, alpha=0.1, linewidth=0)
    return _end(middle)


def name_lines(axes: Axes, ends: Mapping[str, float], colors: Mapping[str, str]) -> None:
    """Write the name and last value of each line at its right end, so that names do not touch.

    Args:
        axes: With the lines, their limits and scales set; names need room at the right.
        ends: Name to the value where its line ends; NaN is left out.
        colors: Name to the color of its line.
    """
    for line in axes.lines:
        named = [name for name in ends if colors[name] == line.get_color()]
        if len(named) == 1:
            line.set_label(named[0])
    to_axes = axes.transData + axes.transAxes.inverted()
    right = axes.get_xlim()[1]
    height = {
        name: float(np.clip(to_axes.transform((right, value))[1], 0, 1))
        for name, value in ends.items()
        if np.isfinite(value)
    }
    tall = axes.get_position().height * axes.figure.get_size_inches()[1]  # type: ignore[union-attr]
    gap = LINE / tall
    names = sorted(height, key=height.__getitem__)
    placed: dict[str, float] = {}
    floor = 0.0
    for name in names:
        placed[name] = max(height[name], floor)
        floor = placed[name] + gap
    ceiling = 1.0
    for name in reversed(names):
        placed[name] = min(placed[name], ceiling)
        ceiling = placed[name] - gap
    for name, y in placed.items():
        axes.annotate(
            f"{name}  {ends[name]:.3g}".strip(), xy=(1.0, height[name]), xytext=(1.03, y),
            xycoords="axes fraction", va="center", fontsize=TEXT_SIZE, color=colors[name],
            fontweight="bold", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colors[name], "linewidth": 0.7, "shrinkA": 0,
                        "relpos": (0, 0.5)},
        )  # fmt: skip


def logarithmic(axes: Axes, axis: Axis | None = None) -> None:
    """Make an axis logarithmic, with plain numbers at its ticks; the vertical one by default."""
    chosen = axis or axes.yaxis
    horizontal = chosen is axes.xaxis
    (axes.set_xscale if horizontal else axes.set_yscale)("log")
    chosen.set_major_locator(LogLocator(subs=(1, 3) if horizontal else (1, 2, 3, 5)))
    chosen.set_major_formatter("{x:g}")
    chosen.set_minor_formatter(NullFormatter())


def _draw_metric(
    axes: Axes,
    stem: str,
    runs: Mapping[str, Sequence[Mapping[str, Curve]]],
    colors: Mapping[str, str],
) -> None:
    last: dict[str, list[float]] = {}
    of_line: dict[str, str] = {}
    drawn = []
    for name, trainings in runs.items():
        for training in trainings:
            for metric in (metric for metric in training if _stem(metric) == stem):
                part = metric.rpartition("/")[0]
                steps, values = _thinned(training[metric])
                axes.plot(steps, values, color=colors[name], linewidth=1.4, alpha=0.85,
                          linestyle=DASHES.get(part, "-"))  # fmt: skip
                label = f"{name} {part}".strip()
                last.setdefault(label, []).append(_end(values))
                of_line[label] = colors[name]
                drawn.append(values)
    drawn_values = np.concatenate(drawn)
    drawn_values = drawn_values[np.isfinite(drawn_values)]
    if (
        drawn_values.size
        and drawn_values.min() > 0
        and drawn_values.max() > 20 * drawn_values.min()
    ):
        logarithmic(axes)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    dress(axes, title=stem.replace("_", " "), x="optimizer steps")
    axes.margins(x=0)
    name_lines(axes, {name: float(np.median(ends)) for name, ends in last.items()}, of_line)


def _stem(name: str) -> str:
    return name.rpartition("/")[2]


def _thinned(curve: Curve) -> Curve:
    """Return means of groups of successive points where there are too many."""
    size = -(-len(curve.steps) // MOST_POINTS)
    starts = np.arange(0, len(curve.steps), size)
    counts = np.diff(np.append(starts, len(curve.steps)))
    values = np.where(np.isfinite(curve.values), curve.values, np.nan)
    return Curve(*(np.add.reduceat(values, starts) / counts for values in (curve.steps, values)))


def _end(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite[-max(1, len(finite) // 10) :])) if len(finite) else float("nan")


TRIAL_WIDTH, TRIAL_HEIGHT, TRIAL_GAP = 2.7, 2.1, 0.95  # inches of a panel, and between them
MARKERS = "osD^"
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
    figure = new_figure(
        0.75 + columns * (TRIAL_WIDTH + TRIAL_GAP), 0.15 + rows * (TRIAL_HEIGHT + TRIAL_GAP)
    )
    colors = colors_of(methods)
    for position, name in enumerate(names):
        row, column = divmod(position, columns)
        left = 0.75 + column * (TRIAL_WIDTH + TRIAL_GAP)
        bottom = 0.5 + (rows - 1 - row) * (TRIAL_HEIGHT + TRIAL_GAP)
        axes = place(figure, left, bottom, TRIAL_WIDTH, TRIAL_HEIGHT)
        _draw(axes, name, methods, colors, score if column == 0 else "")
    figure.axes[columns - 1].legend(
        loc="upper left", bbox_to_anchor=(1.03, 1.0), frameon=False, fontsize=TEXT_SIZE
    )
    head(figure, title, f"{score}, of every trial; ringed: chosen")
    return figure


def numeric_settings(methods: Mapping[str, Tried]) -> list[str]:
    """Return the settings that are numbers in a trial with a score."""
    names = dict.fromkeys(
        name
        for tried in methods.values()
        for trial in tried.trials
        if _number(trial.get("score"))
        for name in tried.chosen
        if _number(trial.get(name))
    )
    return list(names)


def _draw(
    axes: Axes,
    name: str,
    methods: Mapping[str, Tried],
    colors: Mapping[str, str],
    score: str,
) -> None:
    every: list[tuple[float, float]] = []
    for number, (method, tried) in enumerate(methods.items()):
        marker = MARKERS[number // len(PALETTE) % len(MARKERS)]  # where colors repeat
        scored = [t for t in tried.trials if _number(t.get(name)) and _number(t.get("score"))]
        points = [(float(t[name]), float(t["score"])) for t in scored]
        every += points
        axes.scatter([x for x, _ in points], [y for _, y in points], s=22, color=colors[method],
                     marker=marker, alpha=0.8, linewidths=0, label=method)  # fmt: skip
        best = [p for p, t in zip(points, scored, strict=True) if _is_chosen(t, tried.chosen)]
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
