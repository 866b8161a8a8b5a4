"""Drawing one field on a world map with coastlines."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import BoundaryNorm, Colormap
from matplotlib.patches import Polygon
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from harness.figures.style import INK, MUTED, SHADE, TEXT_SIZE, TITLE_SIZE
from weather.data.coastline import coastline
from weather.grid import Grid
from weather.plots.projection import equal_earth, outline


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
    norm = BoundaryNorm(levels, cmap.N, extend="both")
    filled = axes.contourf(x, y, values, levels=levels, cmap=cmap, norm=norm, extend="both")
    filled.set_clip_path(border)
    if lines:
        contours = axes.contour(x, y, values, levels=levels[::2], colors="white", linewidths=0.4)
        contours.set_clip_path(border)
    _coast(axes, border)


def draw_points(axes: Axes, mask: Tensor, grid: Grid) -> None:
    """Mark the cells (H, W) where the mask is true by dots that shrink with their number."""
    rows, columns = mask.cpu().nonzero().T.numpy()
    longitude = (grid.longitude.numpy()[columns] + 180) % 360 - 180
    x, y = equal_earth(grid.latitude.numpy()[rows], longitude)
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


def _coast(axes: Axes, border: Polygon) -> None:
    lines = [
        np.column_stack(equal_earth(latitude, longitude)) for longitude, latitude in coastline()
    ]
    coast = LineCollection(lines, colors=INK, linewidths=0.55, alpha=0.75, zorder=4)
    axes.add_collection(coast, autolim=False)
    coast.set_clip_path(border)


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
            row = np.full((1, values.shape[1]), values[end].mean())
            values = (
                np.insert(values, where, row, axis=0)
                if where == 0
                else np.append(values, row, axis=0)
            )
            latitude = np.insert(latitude, where, pole)
    x, y = equal_earth(latitude[:, None], longitude[None, :])
    return values, x, np.broadcast_to(y, x.shape)
