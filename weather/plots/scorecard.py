"""A score card: methods down, tasks across, colored by the change against a reference method."""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.figures.style import INK, MUTED, SHADE, TEXT_SIZE, TITLE_SIZE, new_figure

INCHES_PER_LETTER = 0.075
FULL_COLOR = 0.5  # relative change at which the color saturates


def scorecard_figure(
    methods: Sequence[str],
    tasks: Sequence[str],
    values: np.ndarray,
    *,
    reference: str,
    units: Sequence[str] | None = None,
    title: str = "",
) -> Figure:
    """Tabulate errors; blue is better than the reference, red is worse.

    Args:
        methods: Names of the M rows.
        tasks: Names of the T columns.
        values: (M, T) errors, smaller is better; NaN is shown as a dash.
        reference: The method that the colors compare with.
        units: Unit of every column, written below its name.
        title: Heading.

    Raises:
        ValueError: If the shape does not fit or the reference is not among the methods.
    """
    values = np.asarray(values, dtype=float)
    if values.shape != (len(methods), len(tasks)):
        raise ValueError(f"values have shape {values.shape}, expected {len(methods), len(tasks)}")
    if reference not in methods:
        raise ValueError(f"reference {reference!r} is none of {', '.join(methods)}")
    base = np.broadcast_to(values[list(methods).index(reference)], values.shape)
    change = np.divide(values, base, out=np.full(values.shape, np.nan), where=base > 0) - 1
    left = 0.25 + INCHES_PER_LETTER * max(map(len, methods))
    column = max(1.12, 0.2 + INCHES_PER_LETTER * max(map(len, tasks)))
    width, height = left + 0.1 + column * len(tasks), 1.15 + 0.42 * len(methods)
    figure = new_figure(width, height)
    axes = figure.add_axes(
        (left / width, 0.12 / height, column * len(tasks) / width, 0.42 * len(methods) / height)
    )
    cmap = mpl.colormaps["RdBu_r"].with_extremes(bad=SHADE)
    shown = np.ma.masked_invalid(np.clip(change, -FULL_COLOR, FULL_COLOR))
    axes.imshow(shown, cmap=cmap, vmin=-1.35 * FULL_COLOR, vmax=1.35 * FULL_COLOR, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        _cell(axes, row, column, value, change[row, column], methods[row] == reference)
    _frame(axes, methods, tasks, units, reference)
    if title:
        figure.text(0.12 / width, 1 - 0.28 / height, title, fontsize=TITLE_SIZE + 1.5,
                    fontweight="bold", color=INK, va="center")  # fmt: skip
    figure.text(1 - 0.06 / width, 1 - 0.28 / height, f"change against {reference}", ha="right",
                va="center", fontsize=TEXT_SIZE, color=MUTED)  # fmt: skip
    return figure


def _cell(
    axes: Axes, row: int, column: int, value: float, change: float, is_reference: bool
) -> None:
    if not np.isfinite(value):
        axes.text(column, row, "–", ha="center", va="center", color=MUTED, fontsize=TEXT_SIZE)
        return
    compared = np.isfinite(change) and not is_reference
    color = "white" if compared and abs(change) > 0.8 * FULL_COLOR else INK
    text = f"{value:#.3g}".rstrip(".") if abs(value) < 1e3 else f"{value:.0f}"
    axes.text(column, row - (0.12 if compared else 0), text, ha="center", va="center", color=color,
              fontsize=TEXT_SIZE + 0.5, fontweight="bold")  # fmt: skip
    if compared:
        axes.text(column, row + 0.26, _percent(change), ha="center", va="center", color=color,
                  fontsize=TEXT_SIZE - 2)  # fmt: skip


def _percent(change: float) -> str:
    rounded = round(100 * change)
    sign = "±" if rounded == 0 else "+" if rounded > 0 else "−"
    return f"{sign}{abs(rounded)} %"


def _frame(
    axes: Axes,
    methods: Sequence[str],
    tasks: Sequence[str],
    units: Sequence[str] | None,
    reference: str,
) -> None:
    names = [
        f"{task}\n{unit}" for task, unit in zip(tasks, units or [""] * len(tasks), strict=True)
    ]
    axes.set_xticks(range(len(tasks)), names, fontsize=TEXT_SIZE, color=INK)
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(methods)), methods, fontsize=TEXT_SIZE, color=INK)
    for label, method in zip(axes.get_yticklabels(), methods, strict=True):
        label.set_fontstyle("italic" if method == reference else "normal")
    axes.set_xticks(np.arange(len(tasks) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(methods) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2.5)
    axes.tick_params(which="both", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
