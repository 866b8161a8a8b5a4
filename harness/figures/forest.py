"""Estimates with their intervals, one under the other, and the differences from a reference."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.figures.style import (
    BLUE,
    GREEN,
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

ROW = 0.27  # inches
FAR = 5.0  # medians of the size of differences, beyond which one is an arrow
DECIMALS = ((1e-4, 7), (1e-2, 5), (10, 3), (100, 2), (1000, 1), (math.inf, 0))


class Estimate(NamedTuple):
    """A line of a forest plot, or a heading.

    Attributes:
        label: Its name.
        value: Mark; None where there is none.
        low: End of its interval.
        high: Other end.
        color: Of mark and interval.
        note: Text at the right; the numbers if empty.
        target: Another value to compare with, an open diamond.
        heading: Whether the label is a heading of those below.
        hollow: Whether the mark is open.
    """

    label: str
    value: float | None = None
    low: float = float("nan")
    high: float = float("nan")
    color: str = BLUE
    note: str = ""
    target: float | None = None
    heading: bool = False
    hollow: bool = False


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


class DifferenceRow(Protocol):
    """A row of an evaluation, see `harness.evidence.Row`."""

    @property
    def method(self) -> str: ...  # noqa: D102
    @property
    def task(self) -> str: ...  # noqa: D102
    @property
    def metric(self) -> str: ...  # noqa: D102
    @property
    def value(self) -> float: ...  # noqa: D102
    @property
    def low(self) -> float: ...  # noqa: D102
    @property
    def high(self) -> float: ...  # noqa: D102
    @property
    def n(self) -> int: ...  # noqa: D102
    @property
    def versus(self) -> str: ...  # noqa: D102
    @property
    def significant(self) -> bool: ...  # noqa: D102


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
        len(text) for panel in panels for text in _numbers(panel)
    )
    height = ROW * len(labels)
    total = max(left + len(panels) * (width + numbers + 0.15), width_of_head(title, note))
    bottom = 0.5 + 0.15 * max(panel.name.count("\n") for panel in panels)
    figure = new_figure(total, (0.55 if note else 0.3) + height + bottom + 0.1)
    for k, panel in enumerate(panels):
        axes = place(figure, left + k * (width + numbers + 0.15), bottom, width, height)
        _draw(axes, panel, first=k == 0)
    head(figure, title, note)
    return figure


ENDS = {None: "", -1: "← better    worse →\n", 1: "← worse    better →\n"}
"""Above the name of a metric, by the sign of a better difference."""


def differences_figure(
    rows: Sequence[DifferenceRow],
    *,
    metrics: Sequence[str] = (),
    sides: Mapping[str, bool | None] | None = None,
    units: str = "independent units",
    title: str = "Paired differences",
) -> Figure:
    """Draw the paired differences of an evaluation, one panel per metric, one heading per task.

    Filled marks are significant after correction. They are blue; or, where it is known whether a
    metric is better when small, green if better than the reference and orange if worse. Differences
    far larger than the others, as those of base rates, are arrows at the edge.

    Args:
        rows: Of an evaluation; those without ``versus`` are left out.
        metrics: Panels; all metrics of the differences by default. Those without a difference are
            left out.
        sides: Metric -> whether it is better when small; None where that is not known.
        units: What intervals are drawn from.
        title: Heading.

    Raises:
        ValueError: No row is a difference in one of the metrics.
    """
    chosen = [row for row in rows if row.versus and (not metrics or row.metric in metrics)]
    if not chosen:
        raise ValueError("no row is a difference: expected rows with `versus`")
    pairs = list(dict.fromkeys((row.task, row.method, row.versus) for row in chosen))
    tasks = list(dict.fromkeys(row.task for row in chosen))
    references = list(dict.fromkeys(row.versus for row in chosen))
    panels = []
    for metric in _with_figures(chosen, metrics):
        by_key = {(r.task, r.method, r.versus): r for r in chosen if r.metric == metric}
        smaller = (sides or {}).get(metric)
        better = None if smaller is None else -1 if smaller else 1
        estimates = []
        for task in tasks:
            if len(tasks) > 1:
                estimates.append(Estimate(task, heading=True))
            estimates += [
                _difference(
                    method if len(references) == 1 else f"{method} − {versus}",
                    by_key.get((of, method, versus)),
                    better,
                )
                for of, method, versus in pairs
                if of == task
            ]
        name, limits = f"{ENDS[better]}{metric}", _limits(estimates)
        panels.append(Panel(estimates, name, zero=0.0, limits=limits, signed=True))
    note = f"minus {', '.join(references)}; " if len(references) == 1 else ""
    counts = [row.n for row in chosen if math.isfinite(row.low)]
    note += f"95 % intervals over {span_of(counts)} {units}" if counts else "no intervals"
    note += "; filled: significant (Holm)"
    note += "; arrow: outside" if any(panel.limits for panel in panels) else ""
    return forest_figure(panels, title=title, note=note)


def span_of(counts: Sequence[int]) -> str:
    """Return a number, or the smallest and the largest one, as words."""
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _with_figures(rows: Sequence[DifferenceRow], metrics: Sequence[str]) -> list[str]:
    """Return the metrics that have a finite difference; the first one if none has."""
    named = list(metrics or dict.fromkeys(row.metric for row in rows))
    measured = {row.metric for row in rows if math.isfinite(row.value)}
    return [metric for metric in named if metric in measured] or named[:1]


def _limits(estimates: Sequence[Estimate]) -> tuple[float, float] | None:
    """Return ends of an axis that leave out values far larger than the others; None if none is."""
    valued = [estimate for estimate in estimates if estimate.value is not None]
    ends = [[x for x in (estimate.value, estimate.low, estimate.high)
              if x is not None and math.isfinite(x)]
            for estimate in valued]  # fmt: skip
    sizes = sorted(max(map(abs, some)) for some in ends)
    if not sizes:
        return None
    most = FAR * sizes[(len(sizes) - 1) // 2]
    near = [some for some in ends if max(map(abs, some)) <= most]
    if len(near) == len(ends) or most == 0:
        return None
    low, high = min(0.0, *(min(some) for some in near)), max(0.0, *(max(some) for some in near))
    gap = 0.12 * (high - low)
    return low - gap, high + gap


def _difference(label: str, row: DifferenceRow | None, better: int | None) -> Estimate:
    if row is None or not math.isfinite(row.value):
        return Estimate(label, note="–")
    color = MUTED
    if row.significant:
        color = BLUE if better is None else GREEN if better * row.value > 0 else ORANGE
    note = "" if math.isfinite(row.low) else "no interval"
    return Estimate(label, row.value, row.low, row.high, color, note, hollow=not row.significant)


def _draw(axes: Axes, panel: Panel, *, first: bool) -> None:
    rows = range(len(panel.estimates))
    if panel.zero is not None:
        axes.axvline(panel.zero, color=MUTED, linewidth=1.0, zorder=1)
    for row, estimate, text in zip(rows, panel.estimates, _numbers(panel), strict=True):
        axes.annotate(text, (1.03, row), va="center", fontsize=TEXT_SIZE,
                      xycoords=("axes fraction", "data"), color=MUTED if estimate.note else INK,
                      annotation_clip=False)  # fmt: skip
        if estimate.value is None:
            continue
        if panel.limits and not panel.limits[0] <= estimate.value <= panel.limits[1]:
            _draw_arrow(axes, estimate, row, panel.limits)
            continue
        axes.plot([estimate.low, estimate.high], [row, row], color=estimate.color, linewidth=2.2,
                  solid_capstyle="butt", alpha=0.55, zorder=2)  # fmt: skip
        axes.scatter([estimate.value], [row], s=30, edgecolors=estimate.color, zorder=3,
                     linewidths=1.3 if estimate.hollow else 0,
                     facecolors="white" if estimate.hollow else estimate.color)  # fmt: skip
        if estimate.target is not None:
            axes.scatter([estimate.target], [row], s=44, marker="D", facecolors="none",
                         edgecolors=INK, linewidths=0.9, zorder=4)  # fmt: skip
    axes.set_ylim(len(panel.estimates) - 0.4, -0.6)
    if panel.limits is not None:
        axes.set_xlim(*panel.limits)
    axes.locator_params(axis="x", nbins=5)
    axes.set_yticks(list(rows), [estimate.label if first else "" for estimate in panel.estimates])
    dress(axes, x=panel.name, rows=True)
    for label, estimate in zip(axes.get_yticklabels(), panel.estimates, strict=True):
        label.set_fontweight("bold" if estimate.heading else "normal")
    for row, estimate in zip(rows, panel.estimates, strict=True):
        if estimate.heading and row:
            axes.axhline(row - 0.5, color=GRID, linewidth=1.0)


def _draw_arrow(axes: Axes, estimate: Estimate, row: int, limits: tuple[float, float]) -> None:
    """Mark an estimate outside of the axis at its edge; its numbers stand at the right."""
    assert estimate.value is not None
    right = estimate.value > limits[1]
    axes.scatter([limits[right]], [row], s=52, marker=">" if right else "<", zorder=3,
                 edgecolors=estimate.color, linewidths=1.3, clip_on=False,
                 facecolors="white" if estimate.hollow else estimate.color)  # fmt: skip


def decimals_of(values: Sequence[float]) -> int:
    """Return with how many decimals numbers are written; NaN is passed over."""
    largest = max((abs(x) for x in values if math.isfinite(x)), default=1.0)
    return next(count for bound, count in DECIMALS if largest < bound)


def _numbers(panel: Panel) -> list[str]:
    """Return the text at the right of every estimate, all with as many decimals."""
    shown = [e for e in panel.estimates if e.value is not None and not e.note]
    ends = [abs(x) for e in shown for x in (e.value, e.low, e.high) if x is not None]
    decimals = decimals_of(ends)
    form = f"{{:{'+' if panel.signed else ''}.{decimals}f}}"
    texts = [
        estimate.note
        if estimate.note or estimate.value is None
        else form.format(estimate.value)
        + f" [{form.format(estimate.low)}, {form.format(estimate.high)}]"
        for estimate in panel.estimates
    ]
    return [text.replace("-", "−") for text in texts]
