"""Colors and frames that the figures share; safe for color-blind readers (Okabe and Ito, 2008)."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#1f2933"
MUTED = "#7b8794"
GRID = "#e4e7eb"
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#6F4E9B"
CLASS_COLORS = (BLUE, "#E69F00", ORANGE)  # diminutive, small, large
SEQUENTIAL = "Blues"
DPI = 110
TITLE_SIZE = 10.5
TEXT_SIZE = 9.0
INCHES_PER_LETTER = 0.075


def new_figure(width: float, height: float) -> Figure:
    """Return an empty white figure; sizes in inches."""
    return Figure(figsize=(width, height), dpi=DPI, facecolor="white")


def place(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Add axes at a place in inches from the lower left corner."""
    total_width, total_height = figure.get_size_inches()
    return figure.add_axes(
        (left / total_width, bottom / total_height, width / total_width, height / total_height)
    )


def dress(axes: Axes, *, title: str = "", x: str = "", y: str = "", grid: bool = True) -> None:
    """Label axes and draw their frame and grid in the style of all figures."""
    if title:
        axes.set_title(title, loc="left", fontsize=TITLE_SIZE, fontweight="bold", color=INK, pad=9)
    axes.set_xlabel(x, fontsize=TEXT_SIZE, color=INK)
    axes.set_ylabel(y, fontsize=TEXT_SIZE, color=INK)
    axes.tick_params(which="both", labelsize=TEXT_SIZE, color=MUTED, labelcolor=INK)
    if grid:
        axes.grid(True, color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(MUTED)


def size_axis(axes: Axes, which: str = "both") -> None:
    """Make axes logarithmic in millimeters, ticks at clinical sizes."""
    ticks = [1, 2, 3, 5, 10, 20, 30]
    for name in ("x", "y") if which == "both" else (which,):
        getattr(axes, f"set_{name}scale")("log")
        axis = getattr(axes, f"{name}axis")
        axis.set_ticks(ticks, [str(tick) for tick in ticks])
        axis.set_ticks([], minor=True)
