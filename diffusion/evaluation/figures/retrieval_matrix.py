"""Which adapters the captions of a concept lead to."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from harness.figures.style import (
    DIVERGING,
    INCHES_PER_LETTER,
    INK,
    TEXT_SIZE,
    head,
    new_figure,
    place,
    width_of_head,
)

CELL = 0.19
"""Inches."""


def retrieval_figure(
    scores: np.ndarray,
    captions: Sequence[str],
    adapters: Sequence[str],
    *,
    title: str = "Captions and adapters",
    note: str = "",
) -> Figure:
    """Draw the mean cosine of the captions of a concept (rows) with every adapter (columns).

    A dot marks the adapter that is closest; it is filled where it is the right one.

    Args:
        scores: (concepts, adapters) mean cosines.
        captions: Names of the concepts.
        adapters: Names of the adapters.
        title: Heading.
        note: Small print below it.

    Raises:
        ValueError: Names and scores have other numbers.
    """
    if scores.shape != (len(captions), len(adapters)) or not scores.size:
        raise ValueError(
            f"scores are {scores.shape}, expected ({len(captions)}, {len(adapters)}), not empty"
        )
    left, below = (0.3 + 0.95 * INCHES_PER_LETTER * max(map(len, n)) for n in (captions, adapters))
    width, height = CELL * len(adapters), CELL * len(captions)
    total = max(left + width + 0.9, width_of_head(title, note))
    figure = new_figure(total, below + height + 0.85)
    axes = place(figure, left, below, width, height)
    most = float(np.nanmax(np.abs(scores)))
    shown = axes.imshow(scores, cmap=DIVERGING, vmin=-most, vmax=most, interpolation="nearest",
                        aspect="auto")  # fmt: skip
    best = scores.argmax(1)
    right = np.array([adapters[b] == name for b, name in zip(best, captions, strict=True)])
    for hit, face in ((True, INK), (False, "white")):
        lines = np.flatnonzero(right == hit)
        axes.scatter(best[lines], lines, s=14, facecolor=face, edgecolor=INK, linewidths=0.8,
                     label="closest, right" if hit else "closest, another one")  # fmt: skip
    axes.set_yticks(range(len(captions)), list(captions))
    axes.set_xticks(range(len(adapters)), list(adapters), rotation=90)
    axes.tick_params(length=0, labelsize=TEXT_SIZE - 1.5, labelcolor=INK)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(shown, cax=place(figure, left + width + 0.15, below, 0.12, height))
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.tick_params(labelsize=TEXT_SIZE - 1.5, labelcolor=INK)
    found = f"closest and right: {int(right.sum())} of {len(right)} (filled dots)"
    head(figure, title, f"{note}; {found}" if note else found)
    return figure


def retrieval_table(
    scores: np.ndarray, captions: Sequence[str], adapters: Sequence[str]
) -> tuple[tuple[str, ...], list[list[object]]]:
    """Return header and rows of the numbers of the figure."""
    rows: list[list[object]] = [
        [concept, adapter, float(scores[line, column])]
        for line, concept in enumerate(captions)
        for column, adapter in enumerate(adapters)
    ]
    return ("captions of", "adapter", "mean cosine"), rows
