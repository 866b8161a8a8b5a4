"""Whether the probabilities of every task come true."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from harness.figures.style import (
    BLUE,
    INK,
    MUTED,
    TEXT_SIZE,
    dress,
    head,
    new_figure,
    place,
    width_of_head,
)
from recsys.metrics.calibration import Reliability

Z = 1.959964  # of a 95 % interval
COLUMNS, SIDE, GAP_X, GAP_Y = 4, 1.5, 0.75, 1.0  # panels in a row, inches


def reliability_figure(
    tasks: Mapping[str, Reliability], *, title: str = "Calibration", note: str = ""
) -> Figure:
    """Draw observed over predicted frequency in bins of equal mass, one panel per task.

    Every panel reaches to the largest frequency of its task; PCOC and the calibration error are
    written above it. The interval of a frequency is that of independent rows (Wilson, 1927).

    Args:
        tasks: Name to its bins, by :func:`recsys.metrics.reliability`.
        title: Heading.
        note: Small print below it.

    Raises:
        ValueError: There is no task.
    """
    if not tasks:
        raise ValueError("tasks are empty, expected at least one")
    columns = min(COLUMNS, len(tasks))
    rows = -(-len(tasks) // columns)
    note = note or (
        "each mark: as many rows, with its 95 % binomial interval; dashed: comes true as predicted"
    )
    width = max(0.3 + columns * (SIDE + GAP_X), width_of_head(title, note))
    figure = new_figure(width, 0.7 + rows * (SIDE + GAP_Y))
    for position, (task, found) in enumerate(tasks.items()):
        row, column = divmod(position, columns)
        bottom = 0.5 + (rows - 1 - row) * (SIDE + GAP_Y)
        axes = place(figure, 0.8 + column * (SIDE + GAP_X), bottom, SIDE, SIDE)
        _draw(axes, task, found, outer=(column == 0, position + columns >= len(tasks)))
    head(figure, title, note)
    return figure


def _draw(axes: Axes, task: str, found: Reliability, *, outer: tuple[bool, bool]) -> None:
    low, high = binomial_interval(found.observed, found.counts)
    most = max([1e-6, *found.predicted.tolist(), *found.observed.tolist()])
    most = max(most, min(float(high.max(initial=0.0)), 2 * most))
    axes.plot([0, 1.1 * most], [0, 1.1 * most], color=MUTED, linewidth=0.9, linestyle="--")
    axes.vlines(found.predicted, low, high, color=BLUE, linewidth=0.9, alpha=0.5)
    axes.plot(found.predicted, found.observed, color=BLUE, linewidth=1.2, marker="o", markersize=3)
    axes.set_xlim(0, 1.1 * most)
    axes.set_ylim(0, 1.1 * most)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(3))
    dress(axes, x="predicted" if outer[1] else "", y="observed" if outer[0] else "")
    axes.set_title(task, loc="left", fontsize=TEXT_SIZE, color=INK, pad=17)
    axes.tick_params(labelsize=TEXT_SIZE - 1.5)
    axes.annotate(_figures(found), (0, 1.03), xycoords="axes fraction",
                  fontsize=TEXT_SIZE - 1.5, color=MUTED)  # fmt: skip


def _figures(found: Reliability) -> str:
    total = found.counts.sum()
    if not total:
        return "no row"
    observed = found.observed @ found.counts
    error = np.abs(found.predicted - found.observed) @ found.counts / total
    ratio = f"PCOC {found.predicted @ found.counts / observed:.2f}" if observed else "no positive"
    return f"{ratio}, ECE {error:.1g}"


def binomial_interval(observed: ArrayLike, counts: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends of the 95 % interval of frequencies of independent rows (Wilson, 1927).

    Args:
        observed: (B,) frequencies.
        counts: (B,) rows.
    """
    share, rows = np.asarray(observed, dtype=float), np.asarray(counts, dtype=float)
    scale = 1 + Z**2 / rows
    center = (share + Z**2 / (2 * rows)) / scale
    half = Z / scale * np.sqrt(share * (1 - share) / rows + Z**2 / (4 * rows**2))
    return np.maximum(center - half, 0.0), np.minimum(center + half, 1.0)
