"""What the report of ``gates video`` draws besides the scores."""

from collections.abc import Sequence

import numpy as np
import polars as pl
import torch

from apps.video.comparison import WEIGHTS, Comparison
from harness.experiment import Arrays, Piece
from harness.report.page import Page
from harness.runs.terminal import stepping, working
from recsys.data.datamodule import TableDataModule
from recsys.diagnosis.diagnose import permutation_importance
from recsys.experiments import TRUTH, probabilities, ranker_of, report_of
from recsys.figures import (
    activations_figure,
    cosines_figure,
    gates_figure,
    importance_figure,
    ranked_list_figure,
    reliability_figure,
    scales_figure,
    sharing_figure,
)
from recsys.inputs import Batch
from recsys.metrics import reliability, user_resamples
from recsys.ranker import Ranker
from recsys.schema import FeatureSchema
from video_multitask.feed import UNWANTED
from video_multitask.scorer import FusedScore

IMPORTANCE_ROWS = 10_000
DAY = "date"
"""Column of KuaiRand that names the day."""

PER_CATEGORY = 3
DRAWN = (
    (
        "activations",
        activations_figure,
        "Activations of the experts of",
        "Left, the standard deviation of the outputs of each expert: in a healthy layer all are "
        "alike. Right, the fraction of them that is 0 or nearly so: an expert of zeros is dead.",
    ),
    (
        "gates",
        gates_figure,
        "Mean weights of the gates of",
        "A row is a gate, and a column an expert; rows sum to 1. Gray: the mask hides the expert. "
        "Framed: one expert gets over 80 %, and the others are hardly used.",
    ),
    (
        "sharing",
        sharing_figure,
        "Who uses the shared experts of",
        "A column is a shared expert, and sums to 1 over its users: by the weights of gates, and "
        "by the size of the gradients of tasks. Framed: a single user has over 80 %.",
    ),
    (
        "cosines",
        cosines_figure,
        "Which tasks conflict at the shared experts of",
        "The cosine between the gradients of two tasks: below 0 they pull the shared experts in "
        "opposite directions.",
    ),
)
"""Figures of the experts of one network: name, function, heading and caption."""


def add_figures(page: Page, comparison: Comparison) -> None:
    """Add calibration, one user's list, experts and fields, of the first seed of each network.

    Args:
        page: The report.
        comparison: Networks of the run; those that are not trained yet are left out.
    """
    pieces = _trained(comparison)
    if not pieces:
        page.text(
            "No network of this run is trained yet: run `evaluate` first. Those of the seed "
            f"{comparison.seeds[0]} would be shown."
        )
        return
    reference = comparison.contest.reference
    shown_piece = next((p for p in pieces if p.method == reference), pieces[0])
    with working(f"scoring {shown_piece.method}"):
        data, ranker = _ranker(comparison, shown_piece)
        test = data.batch("test")
        predicted = probabilities(ranker, test)
    with working("drawing calibration and a list"):
        _calibration(page, data, test, predicted, shown_piece.method)
        _list(page, data, test, predicted)
    _experts(page, comparison, pieces, shown_piece)
    with working("permuting fields"):
        _fields(page, data, ranker)


def _trained(comparison: Comparison) -> list[Piece]:
    """Return the first seed of every network that there is."""
    store = comparison.run.store(WEIGHTS, Arrays())
    chosen = comparison.known()
    pieces = [piece for piece in comparison.pieces(chosen)[0] if piece.seed == comparison.seeds[0]]
    return [piece for piece in pieces if store.find(piece) is not None]


def _ranker(comparison: Comparison, piece: Piece) -> tuple[TableDataModule, Ranker]:
    store = comparison.run.store(WEIGHTS, Arrays())
    data = comparison.data_of(piece.settings)
    return data, ranker_of(piece.settings, store.load(piece), data)


def _calibration(
    page: Page, data: TableDataModule, test: Batch, predicted: np.ndarray, method: str
) -> None:
    bins = {}
    for number, task in enumerate(data.schema.task_names):
        seen = test.mask[:, number].numpy()
        labels = test.labels[:, number].numpy()[seen]
        if 0 < labels.sum() < len(labels):
            bins[task] = reliability(predicted[seen, number], labels, test.weight.numpy()[seen])
    page.section("Calibration")
    caption = (
        f"Test rows, {method}, first seed. Marks below the dashed line: predictions are too high. "
        "PCOC: mean prediction over observed rate, 1 is right; ECE: mean distance from the line."
    )
    page.figure(reliability_figure(bins), caption, name="calibration")


def _list(page: Page, data: TableDataModule, test: Batch, predicted: np.ndarray) -> None:
    """Draw the videos of one day of the user with the most of them, ordered by the prediction."""
    table, schema = data.table("test"), data.schema
    if not schema.user or not schema.item:
        return
    tasks = _shown(data, test.labels.mean(0).numpy())
    wanted = [task for task in tasks if task not in UNWANTED]
    page.section("One user's list")
    if not wanted:
        page.text(f"None: {' and '.join(tasks)} speak against an item, and order no list.")
        return
    rows, day = day_of_one_user(table, schema)
    if not len(rows):
        page.text("None: no test row has a user and an item.")
        return
    places = np.array([schema.task_names.index(task) for task in tasks])
    columns = [f"{TRUTH}{task}" for task in tasks]
    simulated = all(column in table.columns for column in columns)
    truth = table.select(columns).to_numpy()[rows] if simulated else None
    fused = FusedScore(schema.task_names, dict.fromkeys(wanted, 1.0))
    score = fused.log(torch.from_numpy(predicted[rows])).numpy()
    figure = ranked_list_figure(
        [str(item) for item in table[schema.item].gather(rows)],
        tasks,
        predicted[np.ix_(rows, places)],
        true=truth,
        observed=test.labels.numpy()[np.ix_(rows, places)],
        scores=score,
        order=f"ordered by the product of the probabilities of {', '.join(wanted)}",
    )
    source = " True probabilities are those of the simulator." if simulated else ""
    caption = (
        f"The {len(rows)} distinct videos that one user was shown on {day}, each at its first "
        f"exposure, ordered by the product of the predicted probabilities of {', '.join(wanted)}."
        f"{source}"
    )
    page.figure(figure, caption, name="ranked-list")


def day_of_one_user(table: pl.DataFrame, schema: FeatureSchema) -> tuple[np.ndarray, str]:
    """Return rows of the distinct items of one user on one day, the most that there are, and when.

    There are none where user or item is missing in all rows.

    Args:
        table: Test rows; without a column ``date``, all of them are one day.
        schema: Names user and item.
    """
    day = pl.col(DAY) if DAY in table.columns else pl.lit("the days of the test")
    rows = table.select(pl.col(schema.user).alias("user"), pl.col(schema.item).alias("item"),
                        day.alias("day")).with_row_index("row")  # fmt: skip
    rows = rows.drop_nulls().unique(["user", "item", "day"], keep="first", maintain_order=True)
    if not len(rows):
        return np.empty(0, int), ""
    counts = rows.group_by("user", "day").len().sort("len", "user", "day")
    _, when, _ = counts.row(-1)
    rows_of_day = rows.join(counts[-1:], on=["user", "day"], maintain_order="left")
    return rows_of_day["row"].to_numpy().astype(int), str(when)


def _experts(
    page: Page, comparison: Comparison, pieces: Sequence[Piece], shown_piece: Piece
) -> None:
    reports = {}
    for piece in stepping(  # labels that are thresholds have no gate
        "measuring experts",
        [p for p in pieces if not comparison.data_of(p.settings).schema.regressions],
    ):
        data, ranker = _ranker(comparison, piece)
        reports[piece.method] = report_of(ranker, data.batch("test"))
    if shown_piece.method not in reports or not any(report.layers for report in reports.values()):
        return
    page.section("Experts")
    page.figure(
        scales_figure(reports),
        "A mark is an expert, at the standard deviation of its outputs: in a healthy layer all are "
        "alike, and collapse spreads them.",
        name="expert-scales",
    )
    report = reports[shown_piece.method]
    cosines = [layer.cosines for layer in report.layers if layer.cosines is not None]
    conflicts = any(np.isfinite(layer).any() for layer in cosines)  # of two tasks at least
    if report.layers:
        who = shown_piece.method
        for name, draw, title, caption in DRAWN:
            if name != "cosines" or conflicts:
                figure = draw(report, title=f"{title} {who}")
                page.figure(figure, f"{who}, first seed. {caption}", name=name)
    for note in report.notes:
        page.text(note)


def _fields(page: Page, data: TableDataModule, ranker: Ranker) -> None:
    table = data.table("test")
    if len(table) > IMPORTANCE_ROWS:
        table = table.sample(IMPORTANCE_ROWS, seed=0)
    batch = data.transform.batch(table)

    def score(rows: pl.DataFrame) -> np.ndarray:
        return probabilities(ranker, data.transform.batch(rows))

    importances = permutation_importance(
        score,
        table,
        data.schema.features,
        data.schema.task_names,
        batch.labels.numpy(),
        batch.user.numpy(),
        mask=batch.mask.numpy(),
        weights=batch.weight.numpy(),
        repeats=1,
        draws=user_resamples(batch.user.numpy(), resamples=200),
    )
    page.section("Fields")
    page.figure(
        importance_figure(importances, units="users" if data.schema.user else "rows"),
        f"By how much the summed log-loss rises if a field is permuted over {len(table):,} test "
        "rows: the network relies most on what stands above.",
        name="importance",
    )


def _shown(data: TableDataModule, rates: np.ndarray) -> list[str]:
    """Return a few tasks, the most frequent of each category."""
    shown = []
    for category in data.schema.categories:
        places = [n for n, task in enumerate(data.schema.tasks) if task.category == category]
        shown += sorted(places, key=lambda n: -rates[n])[:PER_CATEGORY]
    return [data.schema.task_names[n] for n in sorted(shown)]
