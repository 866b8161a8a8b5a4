"""A recording or a tree, and below it the tokens that attend in each layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import nn

from apps.language.seqboat.pieces import Study, trained_model
from harness.experiment import Arrays, Piece
from harness.figures.style import (
    GRID,
    INK,
    MUTED,
    PALETTE,
    TEXT_SIZE,
    dress,
    head,
    new_figure,
    place,
)
from harness.report.page import Page
from language.seqboat.listops import CLOSE, OPERATORS
from language.seqboat.sequence_model import recorded
from language.seqboat.sequences import batch_of

WIDTH, WAVE, ROW = 6.6, 1.2, 0.2  # inches


def activity(model: nn.Module, x: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the probabilities (classes,) of a sequence, and where each layer attends (layers, T).

    Args:
        model: A trained `SeqBoat`, in evaluation mode.
        x: Samples (S,) from -1 to 1, or symbols.
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
    figure, wave = _panels(active, title, chance, hop / rate, WAVE, "seconds", len(x) / rate)
    wave.plot(np.arange(len(x)) / rate, x, color=INK, linewidth=0.6)
    dress(wave, y="amplitude", grid=False)
    return figure


def tree_figure(
    symbols: Sequence[str], active: NDArray[np.bool_], title: str, chance: float
) -> Figure:
    """Draw a tree of ListOps, every operator as a bar above its arguments, and what attends.

    Args:
        symbols: Of the tree (T,); or others, which then are a row.
        active: True (layers, T) where a token attends.
        title: What was found.
        chance: The probability of that.
    """
    rows = 1 + max(0, *np.cumsum([(s in OPERATORS) - (s == CLOSE) for s in symbols]))
    figure, tree = _panels(active, title, chance, 1.0, ROW * rows, "tokens")
    opened: list[int] = []
    for number, symbol in enumerate(symbols):
        if symbol == CLOSE and opened:
            first = opened.pop()
            tree.barh(len(opened), number + 0.9 - first, 0.8, left=first, color=GRID)
            continue
        shown = symbol.lstrip("[") or symbol
        tree.text(number + 0.25, len(opened), shown, va="center", fontsize=7, color=INK)
        opened += [number] * (symbol in OPERATORS)
    tree.set_ylim(rows - 0.5, -0.5)
    tree.set_axis_off()
    return figure


def add_picture(
    page: Page,
    study: Study,
    piece: Piece,
    x: NDArray[Any],
    symbols: Sequence[str],
    name: str,
    caption: str,
    title: Callable[[NDArray[np.float64]], tuple[str, float]],
) -> None:
    """Add symbols, and which of them attend in each layer, to a report.

    Args:
        page: The report; without weights it stays as it is.
        study: Whose network it is.
        piece: The network.
        x: What it reads (T,).
        symbols: How that is shown (T,).
        name: Of the picture.
        caption: Text below it.
        title: Returns title and probability from what the network returns, as probabilities.
    """
    weights = study.run.store("weights", Arrays())
    if not weights.missing([piece]):
        chances, active = activity(trained_model(piece, weights, study.data), x)
        columns = ["symbol", *(f"layer{n}" for n in range(1, len(active) + 1))]
        rows = [[s, *map(int, a)] for s, a in zip(symbols, active.T, strict=True)]
        figure = tree_figure(symbols, active, *title(chances))
        page.section(f"A {name}").figure(figure, caption, name=name, table=(columns, rows))


def _panels(
    active: NDArray[np.bool_],
    title: str,
    chance: float,
    step: float,
    height: float,
    x: str,
    end: float = 0.0,
) -> tuple[Figure, Axes]:
    """Return a figure of what attends, at least until an end, with empty axes above of a height."""
    layers, tokens = active.shape
    rows = ROW * layers
    figure = new_figure(WIDTH + 0.9, height + rows + 1.35)
    above = place(figure, 0.75, rows + 0.65, WIDTH, height)
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
    for axes in (above, below):
        axes.set_xlim(0, max(end, edges[-1]))
    above.set_xticklabels([])
    silent = "" if active.any() else "no token attends: only the averages are at work"
    below.text(
        0.5, 0.5, silent, transform=below.transAxes, ha="center", va="center", color=INK,
        fontsize=TEXT_SIZE, bbox={"facecolor": "white", "edgecolor": "none", "pad": 2},
    )  # fmt: skip
    dress(below, x=f"{x}; blue: the token attends", grid=False)
    note = f"probability {chance:.2f}; tokens that attend, by layer: {densities_of(active)}"
    head(figure, title, note)
    return figure, above
