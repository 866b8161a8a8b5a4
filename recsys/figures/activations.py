"""Scale of the activations of experts: do they differ, do their units die?"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.figures.curves import logarithmic
from harness.figures.style import (
    BLUE,
    GRID,
    INCHES_PER_LETTER,
    INK,
    MUTED,
    ORANGE,
    TEXT_SIZE,
    dress,
    head,
    new_figure,
    place,
    width_of_head,
)
from recsys.diagnosis.expert_report import NO_EXPERTS, ExpertReport
from recsys.diagnosis.layer_report import LayerReport

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
    layers = _layers(report)
    names = [name for layer in layers for name in layer.expert_names]
    rows = len(names) + len(layers)
    left = 0.35 + INCHES_PER_LETTER * max(map(len, [*names, *(one.name for one in layers)]))
    note = f"{report.rows} rows; {_ratios(layers)}{_note_of_one(layers)}"
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
    dress(rate, x="activations exactly 0 (color), nearly 0 (gray)")
    for axes in (scale, rate):
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.set_yticks(range(len(labels)), [text if axes is scale else "" for text, _ in labels])
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
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
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    head(figure, title, note)
    return figure


def _layers(report: ExpertReport) -> tuple[LayerReport, ...]:
    if not report.layers:
        raise ValueError(f"{NO_EXPERTS}, nothing to draw")
    return report.layers


def _std_axis(axes: Axes, layers: Sequence[LayerReport]) -> float:
    """Set the axis of standard deviations and return where it begins."""
    low, high = _std_limits(layers)
    axes.set_xlim(low, high)
    if low > 0:
        logarithmic(axes, axes.xaxis)
    axes.axvline(1, color=MUTED, linewidth=0.8, linestyle="--", zorder=0)
    dress(axes, x="standard deviation of an expert's output")
    return float(axes.get_xlim()[0])


def _std_limits(layers: Sequence[LayerReport]) -> tuple[float, float]:
    """Return the ends of the axis of standard deviations, which is logarithmic if 0 is outside."""
    stds = np.concatenate([layer.std for layer in layers])
    known = stds[np.isfinite(stds) & (stds > 0)]
    if len(known) and known.max() > 10 * known.min():
        return float(known.min() / 2), float(known.max() * 2)
    return 0.0, 1.15 * float(known.max(initial=0.1))


def _note_of_one(layers: Sequence[LayerReport]) -> str:
    """Return what the dashed line is, if the axis reaches it."""
    low, high = _std_limits(layers)
    return "; dashed: a deviation of 1" if low <= 1 <= high else ""


def _ratios(layers: tuple[LayerReport, ...]) -> str:
    parts = [f"{layer.name} {_times(layer.scale_ratio)}" for layer in layers]
    return f"largest over smallest: {', '.join(parts)}"


def _times(ratio: float) -> str:
    return f"{ratio:.1f}×" if np.isfinite(ratio) else "∞×"
