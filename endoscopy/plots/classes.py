"""Classes: the confusion matrix, and the reliability of their probabilities."""

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from endoscopy.metrics import CLASS_NAMES, sensitivity
from harness.figures.calibration import calibration_figure
from harness.figures.style import (
    INK,
    MUTED,
    SHARES,
    TEXT_SIZE,
    TITLE_SIZE,
    new_figure,
    place,
)


def confusion_figure(matrix: np.ndarray, *, title: str = "True and predicted class") -> Figure:
    """Show counts, colored by their fraction of the true class.

    Args:
        matrix: (3, 3), rows true and columns predicted.
        title: Heading.
    """
    figure = new_figure(5.3, 4.0)
    axes = place(figure, 1.15, 0.2, 3.0, 2.7)
    support = matrix.sum(1, keepdims=True)
    shares = np.divide(matrix, support, out=np.zeros_like(matrix, dtype=float), where=support > 0)
    edges = np.arange(4) - 0.5
    axes.pcolormesh(edges, edges, shares, cmap=mpl.colormaps[SHARES], vmin=0, vmax=1.25,
                    edgecolors="white", linewidth=2.5)  # fmt: skip
    axes.invert_yaxis()
    for (row, column), count in np.ndenumerate(matrix):
        color = "white" if shares[row, column] > 0.6 else INK
        axes.text(column, row - 0.08, f"{count:g}", ha="center", va="center", color=color,
                  fontsize=TITLE_SIZE + 2, fontweight="bold")  # fmt: skip
        axes.text(column, row + 0.22, f"{shares[row, column]:.0%}", ha="center", va="center",
                  color=color, fontsize=TEXT_SIZE - 0.5)  # fmt: skip
    axes.set_xticks(range(3), CLASS_NAMES, fontsize=TEXT_SIZE, color=INK)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_yticks(range(3), CLASS_NAMES, fontsize=TEXT_SIZE, color=INK)
    axes.set_xlabel("predicted", fontsize=TEXT_SIZE, color=MUTED)
    axes.set_ylabel("true", fontsize=TEXT_SIZE, color=MUTED)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    for row, value in enumerate(sensitivity(matrix)):
        axes.annotate(f"n = {support[row, 0]:g}\nrecall {value:.0%}", (2.58, row), va="center",
                      fontsize=TEXT_SIZE, color=INK, annotation_clip=False)  # fmt: skip
    figure.text(0.02, 0.955, title, fontsize=TITLE_SIZE, fontweight="bold", color=INK, va="top")
    return figure


def reliability_figure(
    table: pd.DataFrame, *, error: float | None = None, title: str = "Reliability"
) -> Figure:
    """Plot accuracy over confidence; the area of a mark is its number of samples.

    Args:
        table: Of :func:`endoscopy.metrics.reliability`.
        error: Expected calibration error, written into the plot.
        title: Heading.
    """
    return calibration_figure(
        table["confidence"],
        table["accuracy"],
        table["count"],
        error=error,
        samples="objects",
        x="confidence",
        y="fraction correct",
        title=title,
    )
