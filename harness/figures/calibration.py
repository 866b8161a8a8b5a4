"""Calibration: whether predicted probabilities came true."""

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from harness.figures.style import (
    BLUE,
    GRID,
    INCHES_PER_LETTER,
    MUTED,
    TEXT_SIZE,
    TITLE_SIZE,
    dress,
    new_figure,
    place,
)


def calibration_figure(
    predicted: ArrayLike,
    observed: ArrayLike,
    counts: ArrayLike,
    *,
    error: float | None = None,
    samples: str = "samples",
    x: str = "predicted probability",
    y: str = "observed frequency",
    title: str = "Calibration",
) -> Figure:
    """Plot observed frequencies against predicted probabilities; a mark's area is its sample count.

    Args:
        predicted: (B,) mean predicted probability of each bin.
        observed: (B,) fraction that came true.
        counts: (B,) samples of each bin; empty bins are left out.
        error: Expected calibration error, written down.
        samples: What is counted.
        x: Name of the horizontal axis.
        y: Name of the vertical axis.
        title: Heading.

    Raises:
        ValueError: Shapes differ, or no bin has a sample.
    """
    chance, share, count = (np.asarray(one, dtype=float) for one in (predicted, observed, counts))
    if not chance.shape == share.shape == count.shape or chance.ndim != 1:
        raise ValueError(f"expected three (B,), found {chance.shape}, {share.shape}, {count.shape}")
    filled = count > 0
    if not filled.any():
        raise ValueError("counts are all 0, expected a bin with samples")
    chance, share, count = chance[filled], share[filled], count[filled]
    width = max(4.9, 0.8 + 1.25 * INCHES_PER_LETTER * len(title) * TITLE_SIZE / TEXT_SIZE)
    figure = new_figure(width, 4.3)
    axes = place(figure, 0.65, 0.55, 3.9, 3.2)
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.9, linestyle="--")
    axes.vlines(chance, chance, share, color=GRID, linewidth=5, zorder=1)
    axes.plot(chance, share, color=BLUE, linewidth=1.3)
    axes.scatter(chance, share, s=20 + 260 * count / count.max(), color=BLUE, alpha=0.85,
                 linewidths=0, zorder=3)  # fmt: skip
    low = max(min(0.3, float(min(chance.min(), share.min())) - 0.05), -0.02)
    axes.set_xlim(low, 1.02)
    axes.set_ylim(low, 1.05)
    dress(axes, title=title, x=x, y=y)
    note = f"{int(count.sum())} {samples}"
    note += "" if error is None else f", calibration error {error:.3f}"
    axes.annotate(note, (0.02, 0.98), xycoords="axes fraction", va="top", fontsize=TEXT_SIZE,
                  color=MUTED)  # fmt: skip
    return figure
