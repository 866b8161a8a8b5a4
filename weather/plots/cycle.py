"""The error of cycled analyses over time, one line per method."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from harness.figures.curves import draw_seeds, logarithmic, name_lines
from harness.figures.style import MUTED, SHADE, TEXT_SIZE, dress, new_figure
from weather.plots.labels import method_colors

LETTER = 0.085  # inches, bold


def cycle_figure(
    errors: Mapping[str, np.ndarray],
    *,
    hours: float = 6.0,
    label: str,
    unit: str,
    spin_up: int = 0,
) -> Figure:
    """Plot the error of every method against the days of the cycle.

    Args:
        errors: Method to (cycles,) or (seeds, cycles); seeds are drawn as their median with the
            range as a band. Values that are not finite leave a gap.
        hours: Length of a cycle.
        label: What is plotted, such as ``RMSE of height``.
        unit: Its unit.
        spin_up: Cycles that do not count, shaded.

    Raises:
        ValueError: If there is no method.
    """
    if not errors:
        raise ValueError("errors is empty, expected at least one method")
    width = 8.2 + LETTER * (max(map(len, errors)) + len("  0.0001"))
    figure = new_figure(width, 4.2)
    axes = figure.add_axes((0.7 / width, 0.125, 7.0 / width, 0.76))
    ends: dict[str, float] = {}
    colors = method_colors(errors)
    for method, values in errors.items():
        days = np.arange(1, np.shape(values)[-1] + 1) * hours / 24
        ends[method] = draw_seeds(axes, days, values, colors[method])
    logarithmic(axes)
    axes.set_xlim(0, days[-1])
    if spin_up:
        axes.axvspan(0, spin_up * hours / 24, color=SHADE, zorder=0, linewidth=0)
        axes.annotate("spin-up", (spin_up * hours / 48, 0.03), xycoords=("data", "axes fraction"),
                      ha="center", va="bottom", fontsize=TEXT_SIZE, color=MUTED)  # fmt: skip
    dress(axes, title=f"{label} ({unit})", x="days")
    name_lines(axes, ends, colors)
    return figure
