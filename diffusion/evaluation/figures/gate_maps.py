"""Mean gates of a run by layer and step, a map for each adapter."""

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from diffusion.fusion.recording import GateMap
from harness.figures.style import (
    GRID,
    INCHES_PER_LETTER,
    INK,
    MUTED,
    SHARES,
    TEXT_SIZE,
    dress,
    head,
    new_figure,
    place,
    width_of_head,
)

LINE, STEP = 0.165, 0.13  # inches of a layer, and of a step
NARROWEST = 1.6  # inches of a map


def gate_map_figure(gates: GateMap, *, title: str = "Mean gates", note: str = "") -> Figure:
    """Draw the mean gate by layer (down) and step (right) of every adapter; gray: no change.

    Args:
        gates: Of a run.
        title: Heading.
        note: Small print below it.

    Raises:
        ValueError: No gate was recorded.
    """
    means = np.asarray(gates.means.tolist(), dtype=float).reshape(gates.means.shape)
    steps, layers, adapters = means.shape
    if not means.size:
        raise ValueError(f"gates are empty, found {means.shape}")
    left = 0.3 + 0.9 * INCHES_PER_LETTER * max(map(len, gates.sites))
    letters = max(map(len, gates.adapters)) + 8
    wide = max(NARROWEST, STEP * steps, INCHES_PER_LETTER * letters)
    total = max(left + adapters * (wide + 0.25) + 0.8, width_of_head(title, note))
    figure = new_figure(total, 1.75 + LINE * layers)
    colors = colormaps[SHARES].with_extremes(bad=GRID)
    for number, name in enumerate(gates.adapters):
        axes = place(figure, left + number * (wide + 0.25), 0.55, wide, LINE * layers)
        shown = axes.imshow(
            means[:, :, number].T, cmap=colors, vmin=0, vmax=1, aspect="auto",
            interpolation="nearest", extent=(0.5, steps + 0.5, layers, 0),
        )  # fmt: skip
        dress(axes, title=f"{name}: {np.nanmean(means[:, :, number]):.2f}", x="step", grid=False)
        axes.set_yticks(np.arange(layers) + 0.5, list(gates.sites) if number == 0 else [],
                        fontsize=TEXT_SIZE - 2, color=INK)  # fmt: skip
        axes.tick_params(axis="y", length=0)
    at = left + adapters * (wide + 0.25) - 0.05
    bar = figure.colorbar(shown, cax=place(figure, at, 0.55, 0.12, LINE * layers))
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(labelsize=TEXT_SIZE - 1.5, color=MUTED, labelcolor=INK)
    head(figure, title, note.replace("$", r"\$"))  # a prompt is no formula
    return figure


def gate_table(gates: GateMap) -> tuple[tuple[str, ...], list[list[object]]]:
    """Return header and rows of the numbers that the maps show, steps from 1."""
    rows: list[list[object]] = [
        [name, site, step + 1, mean]
        for place, name in enumerate(gates.adapters)
        for line, site in enumerate(gates.sites)
        for step, mean in enumerate(gates.means[:, line, place].tolist())
    ]
    return ("adapter", "layer", "step", "mean_gate"), rows
