"""Maps of gates: where and how far a network lets observations through."""

from collections.abc import Mapping

import matplotlib as mpl
from matplotlib.figure import Figure
from torch import Tensor

from harness.figures.style import INK, MUTED, TEXT_SIZE, new_figure
from weather.grid import Grid
from weather.plots.maps import draw_cells, head


def gate_figure(
    gates: Mapping[str, Tensor],
    grid: Grid,
    *,
    observed: Tensor | None = None,
    title: str = "Gates",
) -> Figure:
    """Draw gates on world maps with one scale from 0, closed, to 1, open.

    Args:
        gates: Name to (H, W), for example averages over the features of a stage.
        grid: Coordinates.
        observed: Boolean (H, W) of the observed points; the mean gate over them and elsewhere is
            written above each map.
        title: Heading.

    Raises:
        ValueError: If there is no gate.
    """
    if not gates:
        raise ValueError("gates is empty, expected at least one")
    columns = {1: 1, 2: 2, 4: 2}.get(len(gates), 3)
    rows = -(-len(gates) // columns)
    width, height = 4.0 * columns + 0.9, 2.3 * rows + 0.6
    figure = new_figure(width, height)
    axes = figure.subplots(
        rows, columns, squeeze=False,
        gridspec_kw={"left": 0.1 / width, "right": 1 - 0.8 / width, "top": 1 - 0.78 / height,
                     "bottom": 0.06 / height, "wspace": 0.03, "hspace": 0.16},
    )  # fmt: skip
    cmap = mpl.colormaps["YlGnBu"]
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (name, gate) in zip(axes.flat, gates.items(), strict=False):
        mesh = draw_cells(axis, gate, grid, low=0.0, high=1.0, cmap=cmap)
        head(axis, name, _remark(gate, observed))
    place = figure.add_axes((1 - 0.68 / width, 0.2, 0.15 / width, 0.5))
    bar = figure.colorbar(mesh, cax=place)
    bar.ax.tick_params(labelsize=TEXT_SIZE - 1, color=MUTED, labelcolor=INK)
    bar.outline.set_visible(False)
    figure.text(0.1 / width, 1 - 0.28 / height, title, fontsize=13, fontweight="bold", color=INK,
                va="center")  # fmt: skip
    return figure


def _remark(gate: Tensor, observed: Tensor | None) -> str:
    if observed is None or not observed.any() or observed.all():
        return f"mean {gate.mean().item():.2f}"
    there, elsewhere = gate[observed].mean().item(), gate[~observed].mean().item()
    return f"observed {there:.2f}, elsewhere {elsewhere:.2f}"
