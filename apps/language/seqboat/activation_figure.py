"""The samples of a recording, and below them the tokens that attend in each layer."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

from harness.figures.style import INK, MUTED, PALETTE, TEXT_SIZE, dress, head, new_figure, place
from language.seqboat.sequence_model import SeqBoat, recorded
from language.seqboat.sequences import batch_of

WIDTH, WAVE, ROW = 6.6, 1.2, 0.2  # inches


def activity(
    model: SeqBoat, x: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the probabilities (classes,) of a recording, and where each layer attends (layers, T).

    Args:
        model: Trained, in evaluation mode.
        x: Samples (S,) from -1 to 1.
    """
    batch = batch_of([x], np.zeros(1, dtype=np.int64))
    with torch.no_grad(), recorded(model) as passes:
        chances = model(batch.x).softmax(-1)[0]
    return chances.double().numpy(), passes[0].active[:, 0].numpy()


def densities_of(active: NDArray[np.bool_]) -> str:
    """Return the part of the tokens that attends in each layer, in words."""
    return " ".join(f"{density:.0%}" for density in active.mean(1))


def activation_figure(
    x: NDArray[np.float32],
    active: NDArray[np.bool_],
    rate: int,
    hop: int,
    title: str,
    chance: float,
) -> Figure:
    """Draw a recording and the tokens that attend.

    Args:
        x: Samples (S,).
        active: True (layers, T) where a token attends.
        rate: Samples per second.
        hop: Samples from one token to the next.
        title: What was heard.
        chance: The probability of that.
    """
    layers, tokens = active.shape
    rows = ROW * layers
    figure = new_figure(WIDTH + 0.9, WAVE + rows + 1.35)
    wave = place(figure, 0.75, rows + 0.65, WIDTH, WAVE)
    wave.plot(np.arange(len(x)) / rate, x, color=INK, linewidth=0.6)
    step = hop / rate
    below = place(figure, 0.75, 0.45, WIDTH, rows)
    edges = np.arange(tokens + 1) * step
    shown = np.where(active, 1.0, np.nan)
    below.pcolormesh(
        edges, np.arange(layers + 1), shown, cmap=ListedColormap([PALETTE[0]]), vmin=0, vmax=1
    )
    for number in range(1, layers):
        below.axhline(number, color=MUTED, linewidth=0.4)
    below.set_yticks(np.arange(layers) + 0.5, [f"layer {n}" for n in range(1, layers + 1)])
    below.invert_yaxis()
    below.tick_params(axis="y", labelsize=TEXT_SIZE, length=0)
    end = max(len(x) / rate, float(edges[-1]))
    for axes in (wave, below):
        axes.set_xlim(0, end)
    wave.set_xticklabels([])
    dress(wave, y="samples", grid=False)
    dress(below, x="seconds", grid=False)
    note = f"probability {chance:.2f}; tokens that attend, by layer: {densities_of(active)}"
    head(figure, title, note)
    return figure
