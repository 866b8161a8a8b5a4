"""The list that one user gets: predicted and true probabilities, item by item."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from harness.figures.style import (
    BLUE,
    GREEN,
    GRID,
    INCHES_PER_LETTER,
    INK,
    TEXT_SIZE,
    dress,
    head,
    new_figure,
    place,
    width_of_head,
)

ROW, WIDTH, GAP = 0.26, 1.55, 0.25  # inches


def ranked_list_figure(
    items: Sequence[str],
    tasks: Sequence[str],
    predicted: ArrayLike,
    *,
    true: ArrayLike | None = None,
    observed: ArrayLike | None = None,
    scores: ArrayLike | None = None,
    order: str = "",
    most: int = 15,
    title: str = "Ranked list of one user",
) -> Figure:
    """Draw the first items of a list, one panel per task.

    Args:
        items: N labels, such as number and topic.
        tasks: T names; a few, such as the most frequent ones of every category.
        predicted: Probabilities (N, T).
        true: Those that the world has, where it is simulated (N, T).
        observed: What the user did (N, T), 0 or 1.
        scores: What the list is ordered by (N,), the largest first; by default its given order.
        order: What that is, for the small print.
        most: Items shown.
        title: Heading.

    Raises:
        ValueError: Shapes differ, or there is no item or task.
    """
    guess = np.asarray(predicted, dtype=float)
    shape = (len(items), len(tasks))
    others = [None if one is None else np.asarray(one, dtype=float) for one in (true, observed)]
    if 0 in shape or any(one.shape != shape for one in [guess, *others] if one is not None):
        raise ValueError(f"expected items and tasks {shape}, found {guess.shape} and others")
    rank = np.arange(len(items)) if scores is None else np.argsort(-np.asarray(scores))
    rank = rank[:most]
    labels = [f"{place + 1}. {items[i]}" for place, i in enumerate(rank)]
    left = 0.3 + INCHES_PER_LETTER * max(map(len, labels))
    notes = ["bar: predicted"]
    notes += ["diamond: true probability"] if true is not None else []
    notes += ["green: it happened"] if observed is not None else []
    notes += [order] if order else []
    note = f"{'; '.join(notes)}; the first {len(rank)} of {len(items)}"
    width = max(left + len(tasks) * (WIDTH + GAP), width_of_head(title, note))
    figure = new_figure(width, 1.35 + ROW * len(rank))
    for t, task in enumerate(tasks):
        axes = place(figure, left + t * (WIDTH + GAP), 0.35, WIDTH, ROW * len(rank))
        columns = [None if one is None else one[rank, t] for one in (guess, *others)]
        _draw(axes, task, columns, labels if t == 0 else [""] * len(rank))
    head(figure, title, note)
    return figure


def _draw(
    axes: Axes, task: str, columns: Sequence[np.ndarray | None], labels: Sequence[str]
) -> None:
    guess, true, observed = columns
    assert guess is not None
    y = np.arange(len(guess))
    happened = np.zeros(len(guess), dtype=bool) if observed is None else observed > 0.5
    axes.barh(y, guess, height=0.62, color=[GREEN if one else BLUE for one in happened],
              alpha=0.85, linewidth=0, label="predicted")  # fmt: skip
    known = guess if true is None else np.concatenate((guess, true))
    if true is not None:
        axes.scatter(true, y, s=26, marker="D", facecolors="white", edgecolors=INK,
                     linewidths=1.0, zorder=3, label="true")  # fmt: skip
    axes.set_xlim(0, min(1.06, 1.15 * max(float(known.max()), 1e-6)))
    axes.set_ylim(len(guess) - 0.4, -0.6)
    axes.set_yticks(y, labels)
    axes.locator_params(axis="x", nbins=3)
    dress(axes)
    axes.set_title(task, loc="left", fontsize=TEXT_SIZE, color=INK, pad=5)
    axes.grid(False, axis="y")
    axes.grid(True, axis="x", color=GRID, linewidth=0.7)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=TEXT_SIZE - 1)
    axes.spines["left"].set_visible(False)
