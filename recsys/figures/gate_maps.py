"""Figures of experts and gates: who uses whom, and the scales of activations."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from harness.figures.curves import logarithmic
from harness.figures.style import (
    BLUE,
    DIVERGING,
    GRID,
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
from recsys.diagnosis.expert_report import DEGRADED, NO_EXPERTS, ExpertReport, LayerReport

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
        CellMap(
            layer.name,
            layer.tasks,
            layer.tasks,
            np.where(np.eye(len(layer.cosines), dtype=bool), np.nan, layer.cosines),
        )
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
    for cell_map, (left, top) in zip(maps, places, strict=True):
        wide, tall = CELL * len(cell_map.columns), CELL * len(cell_map.rows)
        axes = place(figure, left, height - top - tall, wide, tall)
        _draw(axes, cell_map, diverging)
    head(figure, title, note)
    return figure


def _layout(maps: Sequence[CellMap]) -> tuple[list[tuple[float, float]], float, float]:
    """Return left edge and top of the cells of every map, and the size of all, in inches."""
    places: list[tuple[float, float]] = []
    x, y, width, tallest = 0.0, 0.0, 0.0, 0.0
    for cell_map in maps:
        left = 0.25 + INCHES_PER_LETTER * max(map(len, cell_map.rows))
        cells = CELL * len(cell_map.columns)
        wide = left + max(cells, 1.3 * INCHES_PER_LETTER * len(cell_map.title)) + 0.15
        letters = INCHES_PER_LETTER * max(map(len, cell_map.columns))
        tall = GAP + CELL * len(cell_map.rows) + letters + 0.2
        if x and x + wide > WIDEST:
            x, y, tallest = 0.0, y + tallest, 0.0
        places.append((x + left, y + GAP))
        x, tallest = x + wide, max(tallest, tall)
        width = max(width, x)
    return places, width, y + tallest


def _draw(axes: Axes, cell_map: CellMap, diverging: bool) -> None:
    low = -1.0 if diverging else 0.0
    axes.imshow(cell_map.values, cmap=DIVERGING if diverging else SHARES, vmin=low, vmax=1,
                aspect="auto")  # fmt: skip
    dress(axes, title=cell_map.title, grid=False)
    axes.set_facecolor(SHADE)
    axes.set_xticks(range(len(cell_map.columns)), cell_map.columns, rotation=90)
    axes.set_yticks(range(len(cell_map.rows)), cell_map.rows)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    for (row, column), value in np.ndenumerate(cell_map.values):
        if not np.isfinite(value):
            continue
        dark = abs(value) > 0.6
        axes.annotate(_short(float(value)), (column, row), ha="center", va="center",
                      fontsize=TEXT_SIZE - 1.5,
                      color="white" if dark else INK if abs(value) > 0.05 else MUTED)  # fmt: skip
        if value > cell_map.mark:
            axes.add_patch(Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, fill=False,
                                     edgecolor=ORANGE, linewidth=2))  # fmt: skip


def _short(value: float) -> str:
    """Return two decimals, without a leading 0 and those that are 0 anyway."""
    text = f"{value:.2f}"
    if text in ("0.00", "-0.00"):
        return "0"
    return text.removesuffix(".00").replace("0.", ".", 1).replace("-", "−")


ROW, STRIP = 0.24, 0.42  # inches of an expert, and of a layer
COLLAPSED = 0.75  # zero rate above which an expert counts as collapsed
WIDTH = 2.6


def activations_figure(report: ExpertReport, *, title: str = "Activations of experts") -> Figure:
    """Draw the standard deviation and the zero rate of every expert, layer by layer.

    Args:
        report: Of a model.
        title: Heading.

    Raises:
        ValueError: The model has no experts.
    """
    if not (layers := report.layers):
        raise ValueError(f"{NO_EXPERTS}, nothing to draw")
    names = [name for layer in layers for name in layer.expert_names]
    rows = len(names) + len(layers)
    left = 0.35 + INCHES_PER_LETTER * max(map(len, [*names, *(layer.name for layer in layers)]))
    ratios = ", ".join(f"{layer.name} {_times(layer.scale_ratio)}" for layer in layers)
    note = f"{report.rows} rows; largest over smallest: {ratios}{_note_of_one(layers)}"
    width = max(left + 2 * (WIDTH + 0.4), width_of_head(title, note))
    figure = new_figure(width, 1.25 + ROW * rows)
    scale = place(figure, left, 0.5, WIDTH, ROW * rows)
    rate = place(figure, left + WIDTH + 0.4, 0.5, WIDTH, ROW * rows)
    low = _std_axis(scale, layers)
    labels: list[tuple[str, bool]] = []
    for layer in layers:
        labels.append((layer.name, True))
        first = len(labels)
        labels += [(name, False) for name in layer.expert_names]
        y = np.arange(first, len(labels))
        colors = [ORANGE if zero > COLLAPSED else BLUE for zero in layer.zero_rate]
        scale.hlines(y, low, layer.std, color=GRID, linewidth=4)
        scale.scatter(
            np.maximum(layer.std, low), y, s=30, c=colors, linewidths=0, zorder=3, label=layer.name
        )
        rate.barh(y, layer.near_zero_rate, height=0.62, color=GRID, label="nearly 0")
        rate.barh(y, layer.zero_rate, height=0.62, color=colors, label="exactly 0")
    rate.set_xlim(0, 1)
    dress(rate, x="activations exactly 0 (color), nearly 0 (gray)", rows=True)
    for axes in (scale, rate):
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.set_yticks(range(len(labels)), [text if axes is scale else "" for text, _ in labels])
    for tick, (_, heading) in zip(scale.get_yticklabels(), labels, strict=True):
        tick.set_fontweight("bold" if heading else "normal")
    head(figure, title, note)
    return figure


def scales_figure(
    reports: Mapping[str, ExpertReport], *, title: str = "Scale of experts"
) -> Figure:
    """Draw the standard deviations of the experts of several models, one line per layer.

    Args:
        reports: Name of a model to its report; models without experts are left out.
        title: Heading.

    Raises:
        ValueError: No model has experts.
    """
    strips = [(name, layer) for name, report in reports.items() for layer in report.layers]
    if not strips:
        raise ValueError(f"{NO_EXPERTS}: {', '.join(reports) or 'none given'}")
    names = [f"{name}, {layer.name}" for name, layer in strips]
    texts = [f"{_times(layer.scale_ratio)}, {layer.zero_rate.max():.2f}" for _, layer in strips]
    left = 0.3 + INCHES_PER_LETTER * max(map(len, names))
    right = 0.3 + INCHES_PER_LETTER * max(map(len, texts))
    note = "right: largest over smallest, largest zero rate; orange, hollow: zero rate > .75"
    note += _note_of_one([layer for _, layer in strips])
    width = max(left + 3.4 + right, width_of_head(title, note))
    figure = new_figure(width, 1.25 + STRIP * len(strips))
    axes = place(figure, left, 0.5, 3.4, STRIP * len(strips))
    low = _std_axis(axes, [layer for _, layer in strips])
    for row, ((_, layer), text) in enumerate(zip(strips, texts, strict=True)):
        shown = np.maximum(layer.std, low)  # a constant expert lies at the edge
        axes.plot([shown.min(), shown.max()], [row, row], color=GRID, linewidth=5,
                  solid_capstyle="butt", zorder=1)  # fmt: skip
        for dead, color in ((False, BLUE), (True, ORANGE)):
            std = shown[(layer.zero_rate > COLLAPSED) == dead]
            axes.scatter(std, np.full(len(std), row), s=26, zorder=3, alpha=0.85,
                         facecolors="white" if dead else color, edgecolors=color,
                         linewidths=1.4 if dead else 0)  # fmt: skip
        axes.annotate(text, (1.03, row), xycoords=("axes fraction", "data"), va="center",
                      fontsize=TEXT_SIZE, color=INK, annotation_clip=False)  # fmt: skip
    axes.set_ylim(len(strips) - 0.4, -0.6)
    axes.set_yticks(range(len(strips)), names)
    head(figure, title, note)
    return figure


def _std_axis(axes: Axes, layers: Sequence[LayerReport]) -> float:
    """Set the axis of standard deviations and return where it begins."""
    low, high = _std_limits(layers)
    axes.set_xlim(low, high)
    if low > 0:
        logarithmic(axes, axes.xaxis)
    axes.axvline(1, color=MUTED, linewidth=0.8, linestyle="--", zorder=0)
    dress(axes, x="standard deviation of an expert's output", rows=True)
    return float(axes.get_xlim()[0])


def _std_limits(layers: Sequence[LayerReport]) -> tuple[float, float]:
    """Return the ends of the axis of standard deviations, which is logarithmic if 0 is outside."""
    stds = np.concatenate([layer.std for layer in layers])
    positive = stds[np.isfinite(stds) & (stds > 0)]
    if len(positive) and positive.max() > 10 * positive.min():
        return float(positive.min() / 2), float(positive.max() * 2)
    return 0.0, 1.15 * float(positive.max(initial=0.1))


def _note_of_one(layers: Sequence[LayerReport]) -> str:
    """Return what the dashed line is, if the axis reaches it."""
    low, high = _std_limits(layers)
    return "; dashed: a deviation of 1" if low <= 1 <= high else ""


def _times(ratio: float) -> str:
    return f"{ratio:.1f}×" if np.isfinite(ratio) else "∞×"
