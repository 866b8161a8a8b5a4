"""The error of cycled analyses over time, one line a method."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from weather.plots.style import DPI, GRID, INK, MUTED, TEXT_SIZE, TITLE_SIZE, method_colors

INCHES_PER_LETTER = 0.085


def cycle_figure(
    errors: Mapping[str, np.ndarray],
    *,
    hours: float = 6.0,
    label: str,
    unit: str,
    spin_up: int = 0,
    logarithmic: bool = True,
) -> Figure:
    """Plot the error of every method against the days of the cycle.

    Args:
        errors: Method to (cycles,) or (seeds, cycles); seeds are drawn as their median with the
            range as a band. Values that are not finite leave a gap.
        hours: Length of a cycle.
        label: What is plotted, such as ``RMSE of height``.
        unit: Its unit.
        spin_up: Cycles that do not count, shaded.
        logarithmic: Scale of the error axis.

    Raises:
        ValueError: If there is no method.
    """
    if not errors:
        raise ValueError("errors is empty, expected at least one method")
    width = 8.2 + INCHES_PER_LETTER * (max(map(len, errors)) + len("  0.0001"))
    figure = Figure(figsize=(width, 4.2), dpi=DPI, facecolor="white")
    axes = figure.add_axes((0.7 / width, 0.125, 7.0 / width, 0.76))
    ends: dict[str, float] = {}
    colors = method_colors(errors)
    for method, values in errors.items():
        seeds = np.where(np.isfinite(values), values, np.nan)[None].reshape(
            -1, np.shape(values)[-1]
        )
        days = np.arange(1, seeds.shape[1] + 1) * hours / 24
        middle = np.median(seeds, axis=0)
        axes.plot(days, middle, color=colors[method], linewidth=1.6, solid_joinstyle="round")
        if len(seeds) > 1:
            axes.fill_between(
                days, seeds.min(0), seeds.max(0), color=colors[method], alpha=0.1, linewidth=0
            )
        known = middle[np.isfinite(middle)]
        if len(known):
            ends[method] = float(np.median(known[-max(1, len(known) // 10) :]))
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(0, days[-1])
    if spin_up:
        axes.axvspan(0, spin_up * hours / 24, color="#f2f4f6", zorder=0, linewidth=0)
        axes.annotate("spin-up", (spin_up * hours / 48, 0.03), xycoords=("data", "axes fraction"),
                      ha="center", va="bottom", fontsize=TEXT_SIZE, color=MUTED)  # fmt: skip
    axes.set_title(
        f"{label} ({unit})", loc="left", fontsize=TITLE_SIZE, fontweight="bold", color=INK
    )
    axes.set_xlabel("days", fontsize=TEXT_SIZE, color=INK)
    axes.tick_params(which="both", labelsize=TEXT_SIZE, color=MUTED, labelcolor=INK)
    axes.grid(True, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(MUTED)
    _name_lines(axes, ends, colors)
    return figure


def _name_lines(axes: Axes, ends: dict[str, float], colors: dict[str, str]) -> None:
    """Write the name of each line at its right end, spread so that names do not touch."""
    to_axes = axes.transData + axes.transAxes.inverted()
    right = axes.get_xlim()[1]
    height = {name: to_axes.transform((right, value))[1] for name, value in ends.items()}
    gap = 0.062
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
            f"{name}  {ends[name]:.3g}",
            xy=(1.0, height[name]),
            xytext=(1.03, y),
            xycoords="axes fraction",
            va="center",
            fontsize=TEXT_SIZE,
            color=colors[name],
            fontweight="bold",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colors[name], "linewidth": 0.7, "shrinkA": 0},
        )
