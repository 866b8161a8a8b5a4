"""One analysis on maps: truth, background and analysis above, increment and errors below."""

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, Colormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from harness.figures.style import DIVERGING, INK, MUTED, SEQUENTIAL, TEXT_SIZE, new_figure
from weather.grid import Grid
from weather.plots.labels import field_label, unit_label
from weather.plots.maps import draw_map, draw_points, head, round_levels, symmetric_levels

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
    differences = (analysis - background, background - truth, analysis - truth)
    _differences(figure, axes[1], differences, grid, unit)
    if observed is not None:
        draw_points(axes[1, 0], observed, grid)
        figure.text(0.905, 0.945, f"{int(observed.sum())} observed points", ha="right",
                    fontsize=TEXT_SIZE, color=MUTED)  # fmt: skip
    name = field_label(variable, level)
    heading = title or name[:1].upper() + name[1:]
    figure.text(0.012, 0.945, heading, fontsize=14, fontweight="bold", color=INK)
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
    size = stacked[stacked.isfinite()].abs().quantile(QUANTILE).item() or 1.0
    levels = symmetric_levels(size)
    cmap = mpl.colormaps[DIVERGING]
    names = ("Increment", "Background − truth", "Analysis − truth")
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
