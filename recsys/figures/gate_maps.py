"""Maps of gates and experts: who uses whom, who owns what is shared, which tasks conflict."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from harness.figures.style import (
    DIVERGING,
    INCHES_PER_LETTER,
    INK,
    MUTED,
    ORANGE,
    SHADE,
    SHARES,
    TEXT_SIZE,
    dress,
    head,
    new_figure,
    place,
    width_of_head,
)
from recsys.diagnosis.expert_report import NO_EXPERTS, ExpertReport
from recsys.diagnosis.layer_report import DEGRADED

CELL, GAP = 0.36, 0.4  # inches of a cell, and above a map
WIDEST = 12.5  # inches of maps in a row


class CellMap(NamedTuple):
    """A map of cells with numbers.

    Attributes:
        title: Above it.
        rows: Names.
        columns: Names.
        values: (rows, columns), NaN where there is nothing.
        mark: Values above this are framed.
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: np.ndarray
    mark: float = float("inf")


def gates_figure(report: ExpertReport, *, title: str = "Mean weights of gates") -> Figure:
    """Draw what every gate gives to every expert, one map per layer; gray: never any weight.

    Args:
        report: Of a model.
        title: Heading.

    Raises:
        ValueError: The model has no experts.
    """
    maps = [
        CellMap(
            layer.name,
            layer.gate_names,
            layer.expert_names,
            np.where(layer.visible, layer.weights, np.nan),
            DEGRADED,
        )
        for layer in report.layers
    ]
    note = f"{report.rows} rows; without self gates; framed: above .8"
    return cell_maps(maps, title=title, note=note)


def sharing_figure(report: ExpertReport, *, title: str = "Who uses shared experts") -> Figure:
    """Draw the occupancy of shared experts by gates and, if known, by gradients of tasks.

    Args:
        report: Of a model.
        title: Heading.

    Raises:
        ValueError: No layer has shared experts.
    """
    maps = []
    for layer in report.layers:
        shared = np.flatnonzero(layer.shared)
        if not len(shared):
            continue
        names = [layer.expert_names[e] for e in shared]
        users = np.flatnonzero(layer.users)
        gates = [layer.gate_names[s] for s in users]
        seen = np.where(layer.visible, layer.occupancy, np.nan)
        used = seen[np.ix_(users, shared)]
        maps.append(CellMap(f"{layer.name}, weights", gates, names, used, DEGRADED))
        if (share := layer.gradient_share) is not None:
            by_task = np.where(share > 0, share, np.nan)[:, shared]
            maps.append(CellMap(f"{layer.name}, gradients", layer.tasks, names, by_task, DEGRADED))
    note = "columns sum to 1; gray: none; framed: above .8, the expert is degraded"
    return cell_maps(maps, title=title, note=note)


def cosines_figure(report: ExpertReport, *, title: str = "Do tasks pull together?") -> Figure:
    """Draw the cosine between the gradients of two tasks at the shared experts of every layer.

    Args:
        report: Of a model, with gradients.
        title: Heading.

    Raises:
        ValueError: No gradient was computed.
    """
    maps = [
        CellMap(layer.name, layer.tasks, layer.tasks, _off_diagonal(layer.cosines))
        for layer in report.layers
        if layer.cosines is not None and np.isfinite(layer.cosines).any()
    ]
    note = "cosine of gradients at shared experts: −1 opposed, 1 the same"
    return cell_maps(maps, title=title, note=note, diverging=True)


def cell_maps(
    maps: Sequence[CellMap], *, title: str, note: str = "", diverging: bool = False
) -> Figure:
    """Draw maps side by side, in as many rows as they need.

    Args:
        maps: What is drawn.
        title: Heading.
        note: Small print below it.
        diverging: Whether values lie in [−1, 1], not in [0, 1].

    Raises:
        ValueError: There is no map.
    """
    if not maps:
        raise ValueError(f"{NO_EXPERTS} that could be drawn, or they were not measured")
    places, width, height = _layout(maps)
    width = max(width, width_of_head(title, note))
    figure = new_figure(width, height + 0.7)
    for one, (left, top) in zip(maps, places, strict=True):
        wide, tall = CELL * len(one.columns), CELL * len(one.rows)
        axes = place(figure, left, height - top - tall, wide, tall)
        _draw(axes, one, diverging)
    head(figure, title, note)
    return figure


def _layout(maps: Sequence[CellMap]) -> tuple[list[tuple[float, float]], float, float]:
    """Return left edge and top of the cells of every map, and the size of all, in inches."""
    places: list[tuple[float, float]] = []
    x, y, width, tallest = 0.0, 0.0, 0.0, 0.0
    for one in maps:
        left = 0.25 + INCHES_PER_LETTER * max(map(len, one.rows))
        cells = CELL * len(one.columns)
        wide = left + max(cells, 1.3 * INCHES_PER_LETTER * len(one.title)) + 0.15
        letters = INCHES_PER_LETTER * max(map(len, one.columns))
        tall = GAP + CELL * len(one.rows) + letters + 0.2
        if x and x + wide > WIDEST:
            x, y, tallest = 0.0, y + tallest, 0.0
        places.append((x + left, y + GAP))
        x, tallest = x + wide, max(tallest, tall)
        width = max(width, x)
    return places, width, y + tallest


def _draw(axes: Axes, one: CellMap, diverging: bool) -> None:
    low = -1.0 if diverging else 0.0
    axes.imshow(one.values, cmap=DIVERGING if diverging else SHARES, vmin=low, vmax=1,
                aspect="auto")  # fmt: skip
    dress(axes, title=one.title, grid=False)
    axes.set_facecolor(SHADE)
    axes.set_xticks(range(len(one.columns)), one.columns, rotation=90)
    axes.set_yticks(range(len(one.rows)), one.rows)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    for (row, column), value in np.ndenumerate(one.values):
        if not np.isfinite(value):
            continue
        dark = abs(value) > 0.6
        axes.annotate(_short(float(value)), (column, row), ha="center", va="center",
                      fontsize=TEXT_SIZE - 1.5,
                      color="white" if dark else INK if abs(value) > 0.05 else MUTED)  # fmt: skip
        if value > one.mark:
            axes.add_patch(Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, fill=False,
                                     edgecolor=ORANGE, linewidth=2))  # fmt: skip


def _off_diagonal(values: np.ndarray) -> np.ndarray:
    return np.where(np.eye(len(values), dtype=bool), np.nan, values)


def _short(value: float) -> str:
    """Return two decimals, without a leading 0 and those that are 0 anyway."""
    text = f"{value:.2f}"
    if text in ("0.00", "-0.00"):
        return "0"
    return text.removesuffix(".00").replace("0.", ".", 1).replace("-", "−")
