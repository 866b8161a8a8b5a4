"""Classes: the confusion matrix, and whether probabilities mean what they say."""

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from endoscopy.metrics import CLASS_NAMES, sensitivity
from endoscopy.plots.style import (
    BLUE,
    GRID,
    INK,
    MUTED,
    SEQUENTIAL,
    TEXT_SIZE,
    TITLE_SIZE,
    dress,
    new_figure,
    place,
)


def confusion_figure(matrix: np.ndarray, *, title: str = "True and predicted class") -> Figure:
    """Show counts, colored by their share of the true class.

    Args:
        matrix: (3, 3), rows true and columns predicted.
        title: Heading.
    """
    figure = new_figure(5.3, 4.0)
    axes = place(figure, 1.15, 0.2, 3.0, 2.7)
    support = matrix.sum(1, keepdims=True)
    shares = np.divide(matrix, support, out=np.zeros_like(matrix, dtype=float), where=support > 0)
    edges = np.arange(4) - 0.5
    axes.pcolormesh(edges, edges, shares, cmap=mpl.colormaps[SEQUENTIAL], vmin=0, vmax=1.25,
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
        axes.annotate(f"n = {support[row, 0]:g}\nfound {value:.0%}", (2.58, row), va="center",
                      fontsize=TEXT_SIZE, color=INK, annotation_clip=False)  # fmt: skip
    figure.text(0.02, 0.955, title, fontsize=TITLE_SIZE, fontweight="bold", color=INK, va="top")
    return figure


def reliability_figure(
    table: pd.DataFrame, *, error: float | None = None, title: str = "Reliability"
) -> Figure:
    """Plot accuracy against confidence; the area of a mark is its number of samples.

    Args:
        table: Of :func:`endoscopy.metrics.reliability`.
        error: Expected calibration error, written down.
        title: Heading.
    """
    figure = new_figure(4.9, 4.3)
    axes = place(figure, 0.65, 0.55, 3.9, 3.2)
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.9, linestyle="--")
    for _, row in table.iterrows():
        axes.plot([row["confidence"]] * 2, [row["confidence"], row["accuracy"]], color=GRID,
                  linewidth=5, solid_capstyle="butt", zorder=1)  # fmt: skip
    area = 20 + 260 * table["count"] / table["count"].max()
    axes.plot(table["confidence"], table["accuracy"], color=BLUE, linewidth=1.3)
    axes.scatter(table["confidence"], table["accuracy"], s=area, color=BLUE, alpha=0.85,
                 linewidths=0, zorder=3)  # fmt: skip
    low = min(0.3, float(table[["confidence", "accuracy"]].min().min()) - 0.05)
    axes.set_xlim(max(low, -0.02), 1.02)
    axes.set_ylim(max(low, -0.02), 1.05)
    dress(axes, title=title, x="confidence in the class", y="share that is right")
    note = f"{int(table['count'].sum())} objects"
    note += "" if error is None else f", calibration error {error:.3f}"
    axes.annotate(note, (0.985, 0.03), xycoords="axes fraction", ha="right", fontsize=TEXT_SIZE,
                  color=MUTED)  # fmt: skip
    return figure
