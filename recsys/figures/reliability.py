"""Whether probabilities come true, which fields a model needs, and the list of one user."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from harness.figures import Estimate, Panel, forest_figure
from harness.figures.forest import decimals_of
from harness.figures.style import (
    BLUE,
    GREEN,
    INCHES_PER_LETTER,
    INK,
    MUTED,
    TEXT_SIZE,
    dress,
    head,
    new_figure,
    place,
    width_of_head,
)
from recsys.diagnosis.diagnose import Importance
from recsys.metrics.probabilities import Reliability

Z = 1.959964  # of a 95 % interval
COLUMNS, SIDE, GAP_X, GAP_Y = 4, 1.5, 0.75, 1.0  # panels in a row, inches


def reliability_figure(
    tasks: Mapping[str, Reliability], *, title: str = "Calibration", note: str = ""
) -> Figure:
    """Draw observed over predicted frequency in bins of equal mass, one panel per task.

    Every panel reaches to the largest frequency of its task; PCOC and the calibration error are
    written above it. The interval of a frequency is that of independent rows (Wilson, 1927).

    Args:
        tasks: Name to its bins, by `recsys.metrics.reliability`.
        title: Heading.
        note: Small print below it.

    Raises:
        ValueError: There is no task.
    """
    if not tasks:
        raise ValueError("tasks are empty, expected at least one")
    columns = min(COLUMNS, len(tasks))
    rows = -(-len(tasks) // columns)
    note = note or (
        "each mark: as many rows, with its 95 % binomial interval; dashed: comes true as predicted"
    )
    width = max(0.3 + columns * (SIDE + GAP_X), width_of_head(title, note))
    figure = new_figure(width, 0.7 + rows * (SIDE + GAP_Y))
    for position, (task, bins) in enumerate(tasks.items()):
        row, column = divmod(position, columns)
        bottom = 0.5 + (rows - 1 - row) * (SIDE + GAP_Y)
        axes = place(figure, 0.8 + column * (SIDE + GAP_X), bottom, SIDE, SIDE)
        _draw(axes, task, bins, outer=(column == 0, position + columns >= len(tasks)))
    head(figure, title, note)
    return figure


def _draw(axes: Axes, task: str, bins: Reliability, *, outer: tuple[bool, bool]) -> None:
    low, high = binomial_interval(bins.observed, bins.counts)
    most = max([1e-6, *bins.predicted.tolist(), *bins.observed.tolist()])
    most = max(most, min(float(high.max(initial=0.0)), 2 * most))
    axes.plot([0, 1.1 * most], [0, 1.1 * most], color=MUTED, linewidth=0.9, linestyle="--")
    axes.vlines(bins.predicted, low, high, color=BLUE, linewidth=0.9, alpha=0.5)
    axes.plot(bins.predicted, bins.observed, color=BLUE, linewidth=1.2, marker="o", markersize=3)
    axes.set_xlim(0, 1.1 * most)
    axes.set_ylim(0, 1.1 * most)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(3))
    dress(axes, x="predicted" if outer[1] else "", y="observed" if outer[0] else "")
    axes.set_title(task, loc="left", fontsize=TEXT_SIZE, color=INK, pad=17)
    axes.tick_params(labelsize=TEXT_SIZE - 1.5)
    axes.annotate(_figures(bins), (0, 1.03), xycoords="axes fraction",
                  fontsize=TEXT_SIZE - 1.5, color=MUTED)  # fmt: skip


def _figures(bins: Reliability) -> str:
    total = bins.counts.sum()
    if not total:
        return "no row"
    observed = bins.observed @ bins.counts
    error = np.abs(bins.predicted - bins.observed) @ bins.counts / total
    ratio = f"PCOC {bins.predicted @ bins.counts / observed:.2f}" if observed else "no positive"
    return f"{ratio}, ECE {error:.1g}"


def binomial_interval(observed: ArrayLike, counts: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends of the 95 % interval of frequencies of independent rows (Wilson, 1927).

    Args:
        observed: (B,) frequencies.
        counts: (B,) rows.
    """
    share, rows = np.asarray(observed, dtype=float), np.asarray(counts, dtype=float)
    scale = 1 + Z**2 / rows
    center = (share + Z**2 / (2 * rows)) / scale
    half = Z / scale * np.sqrt(share * (1 - share) / rows + Z**2 / (4 * rows**2))
    return np.maximum(center - half, 0.0), np.minimum(center + half, 1.0)


MOST = 30


def importance_figure(
    found: Sequence[Importance],
    *,
    tasks: Sequence[str] = (),
    title: str = "Permutation importance of fields",
    units: str = "users",
) -> Figure:
    """Draw what the log-loss gains if a field is permuted, the most important first.

    Fields whose importance is written as zero are counted, not drawn.

    Args:
        found: By `recsys.diagnosis.permutation_importance`; the first 30 are
            shown.
        tasks: Tasks with a separate panel, next to that of their sum.
        title: Heading.
        units: What intervals are drawn from.

    Raises:
        ValueError: There is no field, or a task is unknown.
    """
    if not found:
        raise ValueError("no field was permuted, expected at least one")
    if unknown := [task for task in tasks if task not in found[0].tasks]:
        raise ValueError(f"no importance for {', '.join(unknown)}")
    decimals = decimals_of(
        [x for importance in found for x in (importance.total.value, importance.total.high)]
    )
    least = 0.5 * 10**-decimals
    shown = [importance for importance in found if abs(importance.total.value) >= least][
        :MOST
    ] or found[:1]
    columns = {"summed log-loss": [importance.total for importance in shown]}
    columns |= {
        f"log-loss of {task}": [importance.tasks[task] for importance in shown] for task in tasks
    }
    panels = [
        Panel(
            [
                Estimate(importance.field, gap.value, gap.low, gap.high,
                         BLUE if gap.low > 0 else MUTED, hollow=not gap.low > 0)
                for importance, gap in zip(shown, gaps, strict=True)
            ],
            name,
            zero=0.0,
            signed=True,
        )
        for name, gaps in columns.items()
    ]  # fmt: skip
    more = len(found) - len(shown)
    left_out = f"; {more} more near 0 or below" if more else ""
    note = f"increase when permuted over rows; intervals over {units}; hollow: may be 0{left_out}"
    return forest_figure(panels, title=title, note=note)


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
    others = [
        None if chances is None else np.asarray(chances, dtype=float)
        for chances in (true, observed)
    ]
    if 0 in shape or any(
        chances.shape != shape for chances in [guess, *others] if chances is not None
    ):
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
        columns = [None if chances is None else chances[rank, t] for chances in (guess, *others)]
        _draw_list(axes, task, columns, labels if t == 0 else [""] * len(rank))
    head(figure, title, note)
    return figure


def _draw_list(
    axes: Axes, task: str, columns: Sequence[np.ndarray | None], labels: Sequence[str]
) -> None:
    guess, true, observed = columns
    assert guess is not None
    y = np.arange(len(guess))
    happened = np.zeros(len(guess), dtype=bool) if observed is None else observed > 0.5
    axes.barh(y, guess, height=0.62, color=[GREEN if is_click else BLUE for is_click in happened],
              alpha=0.85, linewidth=0, label="predicted")  # fmt: skip
    drawn = guess if true is None else np.concatenate((guess, true))
    if true is not None:
        axes.scatter(true, y, s=26, marker="D", facecolors="white", edgecolors=INK,
                     linewidths=1.0, zorder=3, label="true")  # fmt: skip
    axes.set_xlim(0, min(1.06, 1.15 * max(float(drawn.max()), 1e-6)))
    axes.set_ylim(len(guess) - 0.4, -0.6)
    axes.set_yticks(y, labels)
    axes.locator_params(axis="x", nbins=3)
    dress(axes, rows=True)
    axes.set_title(task, loc="left", fontsize=TEXT_SIZE, color=INK, pad=5)
    axes.tick_params(axis="x", labelsize=TEXT_SIZE - 1)
