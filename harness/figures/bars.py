"""Bars compared with their limits, panels of them, and calibration of probabilities."""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from harness.figures.style import (
    BLUE,
    GREEN,
    GRID,
    INCHES_PER_LETTER,
    INK,
    MUTED,
    ORANGE,
    TEXT_SIZE,
    TITLE_SIZE,
    dress,
    head,
    new_figure,
    place,
    width_of_head,
)

ROW = 0.3  # inches
REACH = 1.0  # margins beyond it are cut, and marked by an arrow
TINY = 1e-4  # no margin is a fraction of a limit below it
COLUMNS, PANEL = 5, (1.75, 0.85)  # panels in a row, inches


class Limit(Protocol):
    """A figure and its limit, see `harness.evidence.Bar`."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def value(self) -> float: ...  # noqa: D102
    @property
    def sense(self) -> str: ...  # noqa: D102
    @property
    def bar(self) -> float: ...  # noqa: D102
    @property
    def unit(self) -> str: ...  # noqa: D102
    @property
    def met(self) -> bool | None: ...  # noqa: D102


def limits_figure(limits: Sequence[Limit], *, title: str = "Bars") -> Figure:
    """Draw by which fraction of its limit every figure meets (right) or misses it (left).

    Args:
        limits: Bars of an evaluation. Where the limit is 0, or next to it, the margin is a number
            next to the line.
        title: Heading.

    Raises:
        ValueError: There is none.
    """
    if not limits:
        raise ValueError("limits are empty, expected at least one")
    texts = [_verdict(limit) for limit in limits]
    left = 0.3 + INCHES_PER_LETTER * max(len(limit.name) for limit in limits)
    note = f"{sum(limit.met is True for limit in limits)} of {len(limits)} met"
    total = left + 2.9 + INCHES_PER_LETTER * (max(map(len, texts)) + 4)
    figure = new_figure(max(total, width_of_head(title, note)), 1.2 + ROW * len(limits))
    axes = place(figure, left, 0.5, 2.6, ROW * len(limits))
    for row, (limit, text) in enumerate(zip(limits, texts, strict=True)):
        color = GREEN if limit.met else ORANGE
        if abs(limit.bar) < TINY:
            _draw_absolute(axes, limit, row, color)
            margin = math.nan
        else:
            margin = _margin(limit)
        if math.isfinite(margin):
            axes.barh(row, margin, height=0.62, color=color, linewidth=0)
        if abs(margin) == REACH:
            axes.scatter([0.97 * margin], [row], s=26, color="white", linewidths=0,
                         marker=">" if margin > 0 else "<", zorder=3)  # fmt: skip
        axes.annotate(text, (1.03, row), xycoords=("axes fraction", "data"), va="center",
                      fontsize=TEXT_SIZE, color=INK, annotation_clip=False)  # fmt: skip
    axes.axvline(0, color=INK, linewidth=1.0)
    axes.set_xlim(-1.02 * REACH, 1.02 * REACH)
    axes.set_ylim(len(limits) - 0.4, -0.6)
    axes.set_yticks(range(len(limits)), [limit.name for limit in limits])
    axes.set_xticks([-1, -0.5, 0, 0.5, 1], ["−100 %", "−50 %", "limit", "+50 %", "+100 %"])
    dress(axes, x="missed by | met by, fraction of the limit; a number where that is 0", rows=True)
    head(figure, title, note)
    return figure


def _draw_absolute(axes: Axes, limit: Limit, row: int, color: str) -> None:
    """Mark a figure whose limit is 0 by a dot at the limit and its distance from there."""
    if not math.isfinite(limit.value):
        return
    right = limit.met
    axes.scatter([0], [row], s=30, color=color, linewidths=0, zorder=3)
    axes.annotate(
        f"{limit.value - limit.bar:+.3g}".replace("-", "−"), (0.06 if right else -0.06, row),
        ha="left" if right else "right", va="center", fontsize=TEXT_SIZE - 1, color=color,
    )  # fmt: skip


def bar_panels(
    parts: Mapping[str, Sequence[float]],
    *,
    span: tuple[float, float] | None = None,
    lines: Mapping[str, float] | None = None,
) -> Figure:
    """Draw the bars of every part in a separate panel, five in a row.

    Args:
        parts: Title of a panel to the heights of its bars, such as a histogram.
        span: Where the first bar begins and the last ends; the bars are numbered from 0 by default.
        lines: Title of a panel to a height to compare with, a line.
    """
    figure, panels = panel_grid(list(parts))
    for axes, (name, heights) in zip(panels, parts.items(), strict=True):
        low, high = span or (-0.5, len(heights) - 0.5)
        width = (high - low) / max(len(heights), 1)
        centers = [low + (i + 0.5) * width for i in range(len(heights))]
        axes.bar(centers, heights, width=width if span else 0.8, color=BLUE, linewidth=0)
        axes.set_xlim(low, high)
        if span is None:
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if lines and name in lines:
            axes.axhline(lines[name], color=INK, linewidth=0.8)
    return figure


def panel_grid(names: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """Return a figure with one small titled panel for every name, five in a row.

    Raises:
        ValueError: There is no name.
    """
    if not names:
        raise ValueError("names are empty, expected at least one panel")
    columns = min(COLUMNS, len(names))
    rows = -(-len(names) // columns)
    letters = max(max(map(len, names)), 1)
    wide = max(PANEL[0], INCHES_PER_LETTER * letters)
    figure = new_figure(0.2 + columns * (wide + 0.25), 0.1 + rows * (PANEL[1] + 0.6))
    panels = []
    for position, name in enumerate(names):
        row, column = divmod(position, columns)
        bottom = 0.3 + (rows - 1 - row) * (PANEL[1] + 0.6)
        axes = place(figure, 0.2 + column * (wide + 0.25), bottom, wide, PANEL[1])
        dress(axes, grid=False)
        axes.set_title(name, loc="left", fontsize=TEXT_SIZE - 0.5, color=INK, pad=5)
        axes.set_yticks([])
        axes.tick_params(labelsize=TEXT_SIZE - 1.5, color=MUTED, labelcolor=MUTED)
        axes.spines["left"].set_visible(False)
        panels.append(axes)
    return figure, panels


def _margin(limit: Limit) -> float:
    """Return how far a figure lies on the right side of its limit, in fractions of it, cut."""
    gap = limit.bar - limit.value if limit.sense == "<=" else limit.value - limit.bar
    margin = gap / abs(limit.bar)
    return margin if math.isnan(margin) else max(-REACH, min(REACH, margin))


def _verdict(bound: Limit) -> str:
    sign = "≤" if bound.sense == "<=" else "≥"
    value = f"{bound.value:.4g}" if math.isfinite(bound.value) else "–"
    limit = f"{sign} {bound.bar:.4g} {bound.unit}".rstrip()
    return f"{value}, needed {limit}: {'met' if bound.met else 'missed'}".replace("-", "−")


def calibration_figure(
    predicted: ArrayLike,
    observed: ArrayLike,
    counts: ArrayLike,
    *,
    error: float | None = None,
    samples: str = "samples",
    x: str = "predicted probability",
    y: str = "observed frequency",
    title: str = "Calibration",
) -> Figure:
    """Plot observed frequencies against predicted probabilities; a mark's area is its sample count.

    Args:
        predicted: (B,) mean predicted probability of each bin.
        observed: (B,) fraction that came true.
        counts: (B,) samples of each bin; empty bins are left out.
        error: Expected calibration error, written down.
        samples: What is counted.
        x: Name of the horizontal axis.
        y: Name of the vertical axis.
        title: Heading.

    Raises:
        ValueError: Shapes differ, or no bin has a sample.
    """
    chance, share, count = (
        np.asarray(values, dtype=float) for values in (predicted, observed, counts)
    )
    if not chance.shape == share.shape == count.shape or chance.ndim != 1:
        raise ValueError(f"expected three (B,), found {chance.shape}, {share.shape}, {count.shape}")
    filled = count > 0
    if not filled.any():
        raise ValueError("counts are all 0, expected a bin with samples")
    chance, share, count = chance[filled], share[filled], count[filled]
    width = max(4.9, 0.8 + 1.25 * INCHES_PER_LETTER * len(title) * TITLE_SIZE / TEXT_SIZE)
    figure = new_figure(width, 4.3)
    axes = place(figure, 0.65, 0.55, 3.9, 3.2)
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.9, linestyle="--")
    axes.vlines(chance, chance, share, color=GRID, linewidth=5, zorder=1)
    axes.plot(chance, share, color=BLUE, linewidth=1.3)
    axes.scatter(chance, share, s=20 + 260 * count / count.max(), color=BLUE, alpha=0.85,
                 linewidths=0, zorder=3)  # fmt: skip
    low = max(min(0.3, float(min(chance.min(), share.min())) - 0.05), -0.02)
    axes.set_xlim(low, 1.02)
    axes.set_ylim(low, 1.05)
    dress(axes, title=title, x=x, y=y)
    note = f"{int(count.sum())} {samples}"
    note += "" if error is None else f", calibration error {error:.3f}"
    axes.annotate(note, (0.02, 0.98), xycoords="axes fraction", va="top", fontsize=TEXT_SIZE,
                  color=MUTED)  # fmt: skip
    return figure
