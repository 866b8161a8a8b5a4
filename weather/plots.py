"""Figures of reports: maps, cycles, score cards. They return Figures and write no files."""

from collections.abc import Iterable, Mapping, Sequence

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import BoundaryNorm, Colormap
from matplotlib.figure import Figure
from matplotlib.patches import Polygon
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from harness.figures.curves import draw_seeds, logarithmic, name_lines
from harness.figures.style import (
    BLUE,
    DIVERGING,
    INK,
    MUTED,
    ORANGE,
    SEQUENTIAL,
    SHADE,
    TEXT_SIZE,
    TITLE_SIZE,
    colors_of,
    dress,
    new_figure,
)
from weather.data.shipped import coastline
from weather.grid import Grid
from weather.state import SHORT_NAMES, ChannelSpec
from weather.variables import unit_of

UNGUIDED = ("free run", "background", "climatology", "persistence")

_SUPERSCRIPTS = {"m2": "m²", "s-1": "s⁻¹", "s-2": "s⁻²", "kg-1": "kg⁻¹"}


def method_colors(methods: Iterable[str]) -> dict[str, str]:
    """Give every method a color, those that see no observations the muted one."""
    names = list(methods)
    muted = [name for name in names if any(w in name.lower().replace("_", " ") for w in UNGUIDED)]
    return colors_of(names, muted=muted)


def unit_label(variable: str) -> str:
    """Return the unit of a variable for display, such as ``m² s⁻²``."""
    return " ".join(_SUPERSCRIPTS.get(part, part) for part in unit_of(variable).split())


def channel_unit(channels: ChannelSpec, label: str) -> str:
    """Return the unit of a channel, by its label such as ``z500``, for display."""
    return unit_label([*channels][channels.labels.index(label)][0])


def field_label(variable: str, level: int | None) -> str:
    """Return a name for titles, such as ``geopotential at 500 hPa`` or ``2m temperature``."""
    words = variable.replace("_", " ")
    if level is None:
        return words
    return f"{words} at {level} hPa" if level >= 50 else f"{words}, layer {level}"


def units_note(channels: ChannelSpec) -> str:
    """Return a sentence on what the short names of metrics mean, with the unit of each variable."""
    names = dict.fromkeys(name for name, _ in channels)
    short = [f"`{SHORT_NAMES.get(n, n)}` {n.replace('_', ' ')} in {unit_label(n)}" for n in names]
    return f"Fields and the units of their errors: {', '.join(short)}."


A1, A2, A3, A4 = 1.340264, -0.081106, 0.000893, 0.003796


def equal_earth(latitude: np.ndarray, longitude: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Project degrees to (x, y) in Earth radii.

    Args:
        latitude: Degrees.
        longitude: Degrees east of the central meridian; beyond ±180 lies outside the outline.
    """
    theta = np.arcsin(np.sqrt(3) / 2 * np.sin(np.deg2rad(latitude)))
    square = theta**2
    slope = A1 + square * (3 * A2 + square**2 * (7 * A3 + square * 9 * A4))
    x = 2 / np.sqrt(3) * np.deg2rad(longitude) * np.cos(theta) / slope
    return x, theta * (A1 + square * (A2 + square**2 * (A3 + square * A4)))


def outline() -> np.ndarray:
    """Return the border of the world map, a closed polygon (points, 2)."""
    north = np.linspace(-90, 90, 91)
    latitude = np.concatenate((north, north[::-1]))
    longitude = np.concatenate((np.full(91, 180.0), np.full(91, -180.0)))
    return np.column_stack(equal_earth(latitude, longitude))


def draw_map(
    axes: Axes,
    field: Tensor,
    grid: Grid,
    *,
    levels: np.ndarray,
    cmap: Colormap,
    lines: bool = False,
) -> None:
    """Fill the contours of a field (H, W) between ``levels``; beyond them colors are extended.

    Args:
        axes: Emptied of ticks and frame.
        field: Values; NaN stays blank.
        grid: Coordinates of the field.
        levels: Ascending contour values.
        cmap: Colors from the lowest to the highest level.
        lines: Draw thin contour lines as well.
    """
    values, x, y = _extended(field.detach().cpu().double().numpy(), grid)
    border = world(axes)
    filled = axes.contourf(
        x,
        y,
        values,
        levels=levels,
        cmap=cmap,
        norm=BoundaryNorm(levels, cmap.N, extend="both"),
        extend="both",
    )
    filled.set_clip_path(border)
    if lines:
        contours = axes.contour(x, y, values, levels=levels[::2], colors="white", linewidths=0.4)
        contours.set_clip_path(border)
    shores = [np.column_stack(equal_earth(lat, lon)) for lon, lat in coastline()]
    coast = LineCollection(shores, colors=INK, linewidths=0.55, alpha=0.75, zorder=4)
    axes.add_collection(coast, autolim=False)
    coast.set_clip_path(border)


def draw_points(axes: Axes, mask: Tensor, grid: Grid) -> None:
    """Mark the cells (H, W) where the mask is true by dots that shrink with their number."""
    rows, columns = mask.cpu().nonzero().T.numpy()
    x, y = equal_earth(
        grid.latitude.numpy()[rows], (grid.longitude.numpy()[columns] + 180) % 360 - 180
    )
    size = float(np.clip(900 / max(len(rows), 1), 0.8, 7.0))
    axes.scatter(x, y, s=size, color=INK, linewidths=0, alpha=0.75, zorder=5)


def world(axes: Axes) -> Polygon:
    """Prepare axes for a world map and return its outline, by which drawings are clipped."""
    axes.set_axis_off()
    axes.set_aspect("equal")
    shape = outline()
    axes.set_xlim(shape[:, 0].min() * 1.01, shape[:, 0].max() * 1.01)
    axes.set_ylim(shape[:, 1].min() * 1.02, shape[:, 1].max() * 1.02)
    border = Polygon(shape, closed=True, facecolor=SHADE, edgecolor=MUTED, linewidth=0.8)
    axes.add_patch(border)
    return border


def head(axes: Axes, title: str, remark: str = "") -> None:
    """Write a title at the left above a map and a remark at the right."""
    axes.set_title(title, loc="left", fontsize=TITLE_SIZE, fontweight="bold", color=INK, pad=4)
    axes.set_title(remark, loc="right", fontsize=TEXT_SIZE, color=MUTED, pad=4)


def round_levels(low: float, high: float, count: int = 16) -> np.ndarray:
    """Return about ``count`` round contour values that cover the range."""
    if not high > low:
        low, high = low - 0.5, high + 0.5
    return np.asarray(MaxNLocator(count, steps=[1, 2, 2.5, 4, 5, 10]).tick_values(low, high))


def symmetric_levels(size: float, count: int = 14) -> np.ndarray:
    """Return round contour values from -size to size, without 0: the middle band is neutral."""
    step = MaxNLocator(count, steps=[1, 2, 2.5, 4, 5, 10]).tick_values(-size, size)
    spacing = step[1] - step[0]
    half = np.arange(0.5, np.ceil(size / spacing) + 0.5) * spacing
    return np.concatenate((-half[::-1], half))


def _extended(values: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Center on longitude 0, repeat a column on both sides, and close the poles by row means."""
    longitude = (grid.longitude.numpy() + 180) % 360 - 180
    order = np.argsort(longitude)
    longitude, values = longitude[order], values[:, order]
    longitude = np.concatenate(([longitude[-1] - 360], longitude, [longitude[0] + 360]))
    values = np.concatenate((values[:, -1:], values, values[:, :1]), axis=1)
    latitude = grid.latitude.numpy()
    for end, where in ((0, 0), (-1, len(latitude))):
        if abs(latitude[end]) < 90:
            pole = np.copysign(90.0, latitude[end])
            values = np.insert(values, where, values[end].mean(), axis=0)
            latitude = np.insert(latitude, where, pole)
    x, y = equal_earth(latitude[:, None], longitude[None, :])
    return values, x, np.broadcast_to(y, x.shape)


QUANTILE = 0.995  # of the differences; single cells beyond it share the last color


def analysis_figure(
    truth: Tensor,
    background: Tensor,
    analysis: Tensor,
    grid: Grid,
    *,
    variable: str,
    level: int | None = None,
    observed: Tensor | None = None,
    title: str = "",
) -> Figure:
    """Show how far observations moved the background towards the truth.

    The upper maps share one scale and the lower maps another one, centered at zero, so that
    colors compare across maps. Differences carry their area-weighted root-mean-square.

    Args:
        truth: (H, W) in physical units.
        background: (H, W).
        analysis: (H, W).
        grid: Coordinates.
        variable: WeatherBench-2 name, which determines the unit.
        level: Level of an upper-air variable.
        observed: Boolean (H, W) of the observed points, drawn as dots.
        title: Heading of the figure; the variable if empty.
    """
    figure = new_figure(12.0, 4.95)
    axes = figure.subplots(
        2, 3, gridspec_kw={"left": 0.012, "right": 0.905, "top": 0.85, "bottom": 0.02,
                           "wspace": 0.03, "hspace": 0.17},
    )  # fmt: skip
    unit = unit_label(variable)
    _fields(figure, axes[0], (truth, background, analysis), grid, unit)
    _differences(
        figure, axes[1], (analysis - background, background - truth, analysis - truth), grid, unit
    )
    if observed is not None:
        draw_points(axes[1, 0], observed, grid)
        figure.text(0.905, 0.945, f"{int(observed.sum())} observed points", ha="right",
                    fontsize=TEXT_SIZE, color=MUTED)  # fmt: skip
    name = field_label(variable, level)
    figure.text(0.012, 0.945, title or name[:1].upper() + name[1:], fontsize=14,
                fontweight="bold", color=INK)  # fmt: skip
    return figure


def _fields(
    figure: Figure, axes: np.ndarray, fields: tuple[Tensor, ...], grid: Grid, unit: str
) -> None:
    stacked = torch.stack([field.detach().double() for field in fields])
    finite = stacked[stacked.isfinite()]
    levels = round_levels(finite.min().item(), finite.max().item())
    cmap = mpl.colormaps[SEQUENTIAL]
    for axis, field, name in zip(axes, fields, ("Truth", "Background", "Analysis"), strict=True):
        draw_map(axis, field, grid, levels=levels, cmap=cmap, lines=True)
        head(axis, name)
    _colorbar(figure, axes[-1], levels, cmap, unit)


def _differences(
    figure: Figure, axes: np.ndarray, fields: tuple[Tensor, ...], grid: Grid, unit: str
) -> None:
    stacked = torch.stack([field.detach().double() for field in fields])
    levels = symmetric_levels(stacked[stacked.isfinite()].abs().quantile(QUANTILE).item() or 1.0)
    cmap = mpl.colormaps[DIVERGING]
    names = ("Increment", "Error before", "Error after")
    for axis, field, name in zip(axes, fields, names, strict=True):
        draw_map(axis, field, grid, levels=levels, cmap=cmap)
        rms = grid.area_mean(field.detach().cpu().double().square()).sqrt().item()
        head(axis, name, f"rms {rms:.3g} {unit}")
    _colorbar(figure, axes[-1], levels, cmap, unit)


def _colorbar(figure: Figure, beside: Axes, levels: np.ndarray, cmap: Colormap, unit: str) -> None:
    box = beside.get_position()
    place = figure.add_axes((0.917, box.y0 + 0.06 * box.height, 0.012, 0.82 * box.height))
    mappable = ScalarMappable(BoundaryNorm(levels, cmap.N, extend="both"), cmap)
    bar = figure.colorbar(mappable, cax=place, extend="both", spacing="proportional")
    ticks = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(levels[0], levels[-1])
    bar.set_ticks([tick for tick in ticks if levels[0] <= tick <= levels[-1]])
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=TEXT_SIZE - 1, color=MUTED, labelcolor=INK)
    bar.outline.set_visible(False)
    place.set_title(unit, fontsize=TEXT_SIZE, color=INK, pad=6, loc="left")


LETTER = 0.085  # inches, bold
LINE_POINTS = 11  # from one name to the next below it


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
        again = colors[method] in {line.get_color() for line in axes.lines}
        ends[method] = draw_seeds(axes, days, values, colors[method])
        axes.lines[-1].set_linestyle("--" if again else "-")
    logarithmic(axes)
    axes.set_xlim(0, max(np.shape(values)[-1] for values in errors.values()) * hours / 24)
    if spin_up:
        axes.axvspan(0, spin_up * hours / 24, color=SHADE, zorder=0, linewidth=0)
        axes.annotate("spin-up", (spin_up * hours / 48, 0.03), xycoords=("data", "axes fraction"),
                      ha="center", va="bottom", fontsize=TEXT_SIZE, color=MUTED)  # fmt: skip
    dress(axes, title=f"{label} ({unit})", x="days")
    name_lines(axes, ends, colors)
    return figure


def cost_figure(
    points: Mapping[str, tuple[float, float, float, float]], *, title: str, cost: str, error: str
) -> Figure:
    """Plot errors and their intervals against what an analysis costs, both logarithmic.

    Every point has its name next to it; networks have another color.

    Args:
        points: Method to its cost, its error, and the ends of the interval of the error.
        title: What is seen.
        cost: What the cost is, with its unit.
        error: What the error is.
    """
    figure = new_figure(9.0, 5.6)
    axes = figure.add_axes((0.075, 0.095, 0.9, 0.83))
    logarithmic(axes)
    logarithmic(axes, axes.xaxis)
    dress(axes, title=title, x=cost, y=error)
    colors = {n: ORANGE if any(w in n for w in ("adas", "gated")) else BLUE for n in points}
    for name, (x, y, low, high) in points.items():
        axes.vlines(x, low, high, colors=colors[name], linewidth=1.2, alpha=0.35)
        axes.scatter([x], [y], s=36, color=colors[name], label=name, zorder=3)
    axes.set_xlim(right=8 * max(x for x, *_ in points.values()))  # room for names
    places = {
        name: axes.transData.transform(point[:2]) * 72 / figure.dpi
        for name, point in sorted(points.items(), key=lambda item: -item[1][1])
    }
    taken: list[tuple[float, float, float]] = []
    for name, (x, y) in places.items():
        beside = [a for a, b in places.values() if abs(b - y) < LINE_POINTS and 0 <= a - x < 20]
        start, low = max(beside) + 6, y
        end = start + 72 * LETTER * len(name)
        for left, right, other in taken:
            if left < end and start < right:
                low = min(low, other - LINE_POINTS)
        taken.append((start, end, low))
        axes.annotate(
            name, points[name][:2], (start - x, low - y), textcoords="offset points", va="center",
            fontsize=TEXT_SIZE, color=colors[name], fontweight="bold",
        )  # fmt: skip
    return figure


def cycle_figures(
    pictures: Mapping[str, Tensor], channels: ChannelSpec, hours: float, caption: str
) -> list[tuple[str, Figure]]:
    """Plot the analysis error of the first channel, a figure and its caption for every task.

    Args:
        pictures: ``task|method`` to errors (T,B,C).
        channels: Of the errors.
        hours: Length of a cycle.
        caption: With ``{task}`` in place of the task.
    """
    variable, level = next(iter(channels))
    figures = []
    for task in dict.fromkeys(key.split("|")[0] for key in pictures):
        errors: dict[str, np.ndarray] = {
            key.split("|")[1]: value[:, :, 0].T.numpy()
            for key, value in pictures.items()
            if key.split("|")[0] == task
        }
        figure = cycle_figure(
            errors,
            hours=hours,
            label=f"Analysis RMSE of {field_label(variable, level)}, {task}",
            unit=unit_label(variable),
            spin_up=max(len(series.T) for series in errors.values()) // 3,
        )
        figures.append((caption.format(task=task), figure))
    return figures


INCHES_PER_LETTER = 0.075
FULL_COLOR = 0.5  # relative change at which the color saturates


def scorecard_figure(
    methods: Sequence[str],
    tasks: Sequence[str],
    values: np.ndarray,
    *,
    reference: str,
    title: str = "",
) -> Figure:
    """Tabulate errors; blue is better than the reference, red is worse.

    Args:
        methods: Names of the M rows.
        tasks: Names of the T columns.
        values: (M, T) errors, smaller is better; NaN is shown as a dash.
        reference: The method that the colors compare with.
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
    _frame(axes, methods, tasks, reference)
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


def _frame(axes: Axes, methods: Sequence[str], tasks: Sequence[str], reference: str) -> None:
    axes.set_xticks(range(len(tasks)), tasks, fontsize=TEXT_SIZE, color=INK)
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
