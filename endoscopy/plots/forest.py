"""Estimates with their intervals, one under the other."""

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from endoscopy.plots.style import (
    BLUE,
    GRID,
    INCHES_PER_LETTER,
    INK,
    MUTED,
    TEXT_SIZE,
    TITLE_SIZE,
    dress,
    new_figure,
    place,
)

ROW = 0.27  # inches


class Estimate(NamedTuple):
    """A line of a forest plot, or a heading.

    Attributes:
        label: Its name.
        value: Mark; None where there is none.
        low: End of its interval.
        high: Other end.
        color: Of mark and interval.
        note: Text at the right; the numbers if empty.
        target: Another value to compare with, a hollow mark.
        heading: Whether the label is a heading of those below.
    """

    label: str
    value: float | None = None
    low: float = float("nan")
    high: float = float("nan")
    color: str = BLUE
    note: str = ""
    target: float | None = None
    heading: bool = False


class Panel(NamedTuple):
    """One column of estimates over a shared list of labels.

    Attributes:
        estimates: As many in every panel.
        name: Of the axis.
        zero: Where a line is drawn, such as no difference.
        limits: Of the axis; from the intervals if None.
        signed: Whether numbers carry their sign.
    """

    estimates: Sequence[Estimate]
    name: str
    zero: float | None = None
    limits: tuple[float, float] | None = None
    signed: bool = False


def forest_figure(
    panels: Sequence[Panel], *, title: str, note: str = "", width: float = 2.6
) -> Figure:
    """Draw panels side by side; their rows share the labels at the left.

    Args:
        panels: One or more, with the same labels.
        title: Heading.
        note: Small print below it.
        width: Of the axes of a panel, inches.

    Raises:
        ValueError: Panels differ in their labels, or there is none.
    """
    labels = [estimate.label for estimate in panels[0].estimates] if panels else []
    if not labels or any([e.label for e in panel.estimates] != labels for panel in panels):
        raise ValueError("panels must have the same labels, and at least one")
    left = 0.3 + INCHES_PER_LETTER * max(map(len, labels))
    numbers = 0.2 + INCHES_PER_LETTER * max(
        len(_numbers(e, panel.signed)) for panel in panels for e in panel.estimates
    )
    top = 0.3 if not note else 0.55
    height = ROW * len(labels)
    total = left + len(panels) * (width + numbers + 0.15)
    total = max(total, 0.4 + 1.12 * INCHES_PER_LETTER * len(title), 0.4 + 0.066 * len(note) * 1.02)
    figure = new_figure(total, top + height + 0.6)
    for k, panel in enumerate(panels):
        axes = place(figure, left + k * (width + numbers + 0.15), 0.5, width, height)
        _draw(axes, panel, first=k == 0)
    tall = figure.get_size_inches()[1]
    figure.text(0.12 / total, 1 - 0.12 / tall, title, va="top", fontsize=TITLE_SIZE + 1,
                fontweight="bold", color=INK)  # fmt: skip
    figure.text(0.12 / total, 1 - 0.42 / tall, note, va="top", fontsize=TEXT_SIZE, color=MUTED)
    return figure


def _draw(axes: Axes, panel: Panel, *, first: bool) -> None:
    rows = range(len(panel.estimates))
    if panel.zero is not None:
        axes.axvline(panel.zero, color=MUTED, linewidth=1.0, zorder=1)
    for row, one in zip(rows, panel.estimates, strict=True):
        axes.annotate(_numbers(one, panel.signed), (1.03, row), va="center", fontsize=TEXT_SIZE,
                      xycoords=("axes fraction", "data"), color=MUTED if one.note else INK,
                      annotation_clip=False)  # fmt: skip
        if one.value is None:
            continue
        axes.plot([one.low, one.high], [row, row], color=one.color, linewidth=2.2,
                  solid_capstyle="butt", alpha=0.55, zorder=2)  # fmt: skip
        axes.scatter([one.value], [row], s=30, color=one.color, linewidths=0, zorder=3)
        if one.target is not None:
            axes.scatter([one.target], [row], s=44, marker="D", facecolors="none",
                         edgecolors=INK, linewidths=0.9, zorder=4)  # fmt: skip
    axes.set_ylim(len(panel.estimates) - 0.4, -0.6)
    if panel.limits is not None:
        axes.set_xlim(*panel.limits)
    axes.set_yticks(list(rows), [one.label if first else "" for one in panel.estimates])
    dress(axes, x=panel.name)
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    for label, one in zip(axes.get_yticklabels(), panel.estimates, strict=True):
        label.set_fontweight("bold" if one.heading else "normal")
    for row, one in zip(rows, panel.estimates, strict=True):
        if one.heading and row:
            axes.axhline(row - 0.5, color=GRID, linewidth=1.0)


def _numbers(one: Estimate, signed: bool) -> str:
    if one.note or one.value is None:
        return one.note
    sign = "+" if signed else ""
    text = f"{one.value:{sign}.3f} [{one.low:{sign}.3f}, {one.high:{sign}.3f}]"
    return text.replace("-", "−")
