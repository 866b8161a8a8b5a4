"""Bars of gate scores."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from harness.figures.style import BLUE, GRID, INK, MUTED, ORANGE, TEXT_SIZE, new_figure, place

COLUMNS = 4
WIDTH, HEIGHT = 2.05, 1.0  # inches of a panel
START = 0.5  # where sigmoid gates start
NEARLY_CLOSED = 0.1


def gate_figure(scores: Mapping[str, Tensor], *, title: str = "Gates") -> Figure:
    """Draw the scores of every gate, sorted in descending order.

    A line marks 0.5, where sigmoid gates start; bars below 0.1 are nearly closed and orange. Each
    panel states the mean and the number of nearly closed features.

    Args:
        scores: Name of the gate to its scores (C,).
        title: Heading.

    Raises:
        ValueError: There is no gate.
    """
    if not scores:
        raise ValueError("scores is empty, expected at least one gate")
    columns = min(COLUMNS, len(scores))
    rows = -(-len(scores) // columns)
    width = max(4.6, 0.5 + columns * (WIDTH + 0.25))
    height = 0.95 + rows * (HEIGHT + 0.5)
    figure = new_figure(width, height)
    figure.text(0.45 / width, 1 - 0.28 / height, title, fontsize=13, fontweight="bold", color=INK,
                va="center")  # fmt: skip
    top = max(1.0, *(float(values.detach().max()) for values in scores.values()))
    for position, (name, values) in enumerate(scores.items()):
        row, column = divmod(position, columns)
        left = 0.45 + column * (WIDTH + 0.25)
        bottom = height - 0.9 - row * (HEIGHT + 0.5) - HEIGHT
        axes = place(figure, left, bottom, WIDTH, HEIGHT)
        _bars(axes, name, values.detach().float().cpu().numpy(), top, first=column == 0)
    figure.text(
        0.45 / width, 0.16 / height, "features of each gate, sorted by score; line at 0.5",
        fontsize=TEXT_SIZE - 1, color=MUTED, va="center",
    )  # fmt: skip
    return figure


def _bars(axes: Axes, name: str, values: np.ndarray, top: float, *, first: bool) -> None:
    ordered = -np.sort(-values)
    open_, closed = ordered[ordered >= NEARLY_CLOSED], ordered[ordered < NEARLY_CLOSED]
    where = np.arange(len(ordered))
    axes.bar(where[: len(open_)], open_, width=1.0, color=BLUE, linewidth=0)
    axes.bar(where[len(open_) :], closed.clip(min=0.01), width=1.0, color=ORANGE, linewidth=0)
    axes.axhline(START, color=INK, linewidth=0.6)
    axes.set_xlim(-0.5, len(ordered) - 0.5)
    axes.set_ylim(0, 1.02 * top)
    axes.set_xticks([])
    axes.set_yticks([0, 0.5, 1.0], ["0", ".5", "1"] if first else ["", "", ""])
    axes.tick_params(labelsize=TEXT_SIZE - 1.5, color=GRID, labelcolor=MUTED, pad=2)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)
    note = f"mean {values.mean():.2f}" + (f", {len(closed)} closed" if len(closed) else "")
    axes.set_title(_short(name), loc="left", fontsize=TEXT_SIZE - 1, color=INK, pad=10)
    axes.text(0, 1.03, f"{len(ordered)} features, {note}", fontsize=TEXT_SIZE - 2.5, color=MUTED,
              transform=axes.transAxes)  # fmt: skip


def _short(name: str) -> str:
    """Drop the part that all names have in common, and cut to the width of a panel."""
    name = name.removeprefix("branches.").removesuffix(".gate")
    return name if len(name) <= 30 else f"…{name[-29:]}"
