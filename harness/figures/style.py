"""The style of all figures: frames, sizes, and colors safe for color-blind readers.

Colors follow Okabe and Ito (2008); no figure tells by color alone what its words or marks do not.
"""

from collections.abc import Collection, Iterable

from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#1f2933"
MUTED = "#7b8794"
GRID = "#e4e7eb"
SHADE = "#f2f4f6"
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
AMBER, SKY, BROWN, PURPLE = "#E69F00", "#56B4E9", "#8C6D31", "#6F4E9B"
PALETTE = (BLUE, ORANGE, GREEN, BROWN, SKY, AMBER, PINK, PURPLE)  # the first six differ for all
SEQUENTIAL = "viridis"  # fields
SHARES = "Blues"  # from none, nearly white, to all
DIVERGING = "RdBu_r"
DPI = 110
TITLE_SIZE = 10.5
TEXT_SIZE = 9.0
INCHES_PER_LETTER = 0.075  # of text of TEXT_SIZE, on average


def new_figure(width: float, height: float) -> Figure:
    """Return an empty white figure; sizes in inches."""
    return Figure(figsize=(width, height), dpi=DPI, facecolor="white")


def place(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Add axes at a place in inches from the lower left corner."""
    total_width, total_height = figure.get_size_inches()
    return figure.add_axes(
        (left / total_width, bottom / total_height, width / total_width, height / total_height)
    )


def head(figure: Figure, title: str, note: str = "") -> None:
    """Write a title at the upper left corner and small print below it."""
    width, height = figure.get_size_inches()
    figure.text(0.12 / width, 1 - 0.12 / height, title, va="top", fontsize=TITLE_SIZE + 1,
                fontweight="bold", color=INK)  # fmt: skip
    figure.text(0.12 / width, 1 - 0.42 / height, note, va="top", fontsize=TEXT_SIZE, color=MUTED)


def width_of_head(title: str, note: str = "") -> float:
    """Return the smallest width of a figure, in inches, that holds its title and small print."""
    return 0.4 + INCHES_PER_LETTER * max(1.12 * len(title), 0.9 * len(note))


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


def colors_of(names: Iterable[str], *, muted: Collection[str] = ()) -> dict[str, str]:
    """Give every name a color of the palette; names in ``muted``, such as references, are gray."""
    colors: dict[str, str] = {}
    hues = 0
    for name in names:
        if name in muted:
            colors[name] = MUTED
        else:
            colors[name] = PALETTE[hues % len(PALETTE)]
            hues += 1
    return colors
