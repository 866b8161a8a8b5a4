"""The style of all figures, and the numbers that a figure shows, read from it again."""

from collections.abc import Collection, Iterable, Iterator
from typing import Any, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import LineCollection, PathCollection, PolyCollection, QuadMesh
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator

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


def dress(
    axes: Axes,
    *,
    title: str = "",
    x: str = "",
    y: str = "",
    grid: bool = True,
    rows: bool = False,
) -> None:
    """Label axes and draw their frame and grid in the style of all figures.

    Where ``rows`` are named at the left, that side has names alone: no line, ticks or grid.
    """
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
    if rows:
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)


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


COLUMNS = ("panel", "kind", "series", "x", "y", "x_end", "y_end", "value")
MOST_CELLS = 100_000  # of an image; larger ones are pictures


def drawn_numbers(figure: Figure) -> list[list[Any]]:
    """Return the numbers a figure draws: lines, points, bars, segments, bands and image cells.

    Args:
        figure: Of any kind. Pictures in colors, and texts, have no numbers.

    Returns:
        Rows of `COLUMNS`. ``panel`` is the title of the axes, or their number. Segments and
        bars reach from (x, y) to (x_end, y_end); a cell at (x, y) has a value. Positions that the
        axis names, such as the methods of a forest plot, have these names.
    """
    rows: list[list[Any]] = []
    for number, axes in enumerate(figure.axes, 1):
        title = next((t for t in (axes.get_title(loc=at) for at in ("left", "center")) if t), "")
        panel = title or axes.get_xlabel() or str(number)
        names = _names(axes.xaxis), _names(axes.yaxis)
        for kind, series, x, y, *rest in _drawn(axes):
            x_end, y_end, value = [*rest, None, None, None][:3]
            rows.append([panel, kind, series, names[0].get(x, x), names[1].get(y, y), x_end,
                         names[1].get(y_end, y_end), value])  # fmt: skip
    return rows


def _drawn(axes: Axes) -> Iterator[tuple[Any, ...]]:
    for number, line in enumerate(axes.lines, 1):
        label = _label(line, f"line {number}")
        for x, y in np.asarray(line.get_xydata(), dtype=float).tolist():
            yield "line", label, x, y
    for patch in axes.patches:
        if isinstance(patch, Rectangle):
            (x, y), width, height = patch.get_xy(), patch.get_width(), patch.get_height()
            yield "bar", _label(patch), x, y, x + width, y + height
    for number, collection in enumerate(axes.collections, 1):
        label = _label(collection, f"set {number}")
        if isinstance(collection, PathCollection):
            for x, y in _plain(collection.get_offsets()).tolist():
                yield "point", label, x, y
        elif isinstance(collection, LineCollection):
            for segment in collection.get_segments():
                if len(segment):
                    yield "segment", label, *map(float, segment[0]), *map(float, segment[-1])
        elif isinstance(collection, QuadMesh):
            yield from _cells(label, collection.get_array())
        elif isinstance(collection, PolyCollection):
            for path in collection.get_paths():
                for x, y in np.asarray(path.vertices, dtype=float).tolist():
                    yield "band", label, x, y
    for number, image in enumerate(axes.images, 1):
        yield from _cells(f"image {number}", image.get_array())


def _cells(label: str, array: Any) -> Iterator[tuple[Any, ...]]:
    """Yield the cells of an array (rows, columns)."""
    if array is None or np.ndim(array) != 2 or np.size(array) > MOST_CELLS:
        return
    for (row, column), value in np.ndenumerate(_plain(array)):
        yield "cell", label, column, row, None, None, float(value)


def _plain(array: Any) -> np.ndarray:
    """Return numbers, NaN where they are masked."""
    return cast(np.ndarray, np.ma.masked_array(array, dtype=float).filled(np.nan))


def _label(artist: Any, otherwise: str = "") -> str:
    label = str(artist.get_label())
    return otherwise if label.startswith("_") else label


def _names(axis: Axis) -> dict[Any, str]:
    """Return the positions that an axis names by words."""
    locator = axis.get_major_locator()
    if not isinstance(locator, FixedLocator):
        return {}
    places = [float(place) for place in locator()]
    texts = axis.get_major_formatter().format_ticks(places)
    named = zip(places, texts, strict=True)
    return {place: text for place, text in named if any(map(str.isalpha, text))}
