"""What the report of ``gates video`` draws besides the scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
import torch

from apps.video.comparison import TRUTH, WEIGHTS, Comparison
from apps.video.training import ranker_of
from harness.experiment import Arrays, Piece
from harness.report.page import Page
from recsys.batch import Batch
from recsys.data.datamodule import TableDataModule
from recsys.diagnosis.importance import permutation_importance
from recsys.experiments.faults import report_of
from recsys.experiments.predictions import probabilities
from recsys.figures import (
    activations_figure,
    gates_figure,
    importance_figure,
    ranked_list_figure,
    reliability_figure,
    scales_figure,
    sharing_figure,
)
from recsys.metrics import reliability
from recsys.metrics.resampled import user_resamples
from recsys.ranker import Ranker
from video_multitask.fused_score import FusedScore
from video_multitask.tasks import UNWANTED

IMPORTANCE_ROWS = 10_000
LISTED = 40
"""Most videos that are ranked for one user."""

PER_CATEGORY = 3


def add_figures(page: Page, comparison: Comparison) -> None:
    """Add calibration, one user's list, experts and fields, of the first seed of each network.

    Args:
        page: The report.
        comparison: Networks of the run; those that are not trained yet are left out.
    """
    pieces = _trained(comparison)
    if not pieces:
        page.text("No network of this run is trained yet: run `evaluate` first.")
        return
    reference = comparison.contest.reference
    own = next((p for p in pieces if p.method == reference), pieces[0])
    data, ranker = _ranker(comparison, own)
    test = data.batch("test")
    found = probabilities(ranker, test)
    _calibration(page, data, test, found, own.method)
    _list(page, data, test, found)
    _experts(page, comparison, pieces, own)
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
    return data, ranker_of(piece, store.load(piece), data)


def _calibration(
    page: Page, data: TableDataModule, test: Batch, found: np.ndarray, method: str
) -> None:
    bins = {}
    for number, task in enumerate(data.schema.task_names):
        seen = test.mask[:, number].numpy()
        labels = test.labels[:, number].numpy()[seen]
        if 0 < labels.sum() < len(labels):
            bins[task] = reliability(found[seen, number], labels)
    page.section("Calibration")
    page.figure(reliability_figure(bins), f"Test rows, {method}, first seed.", name="calibration")


def _list(page: Page, data: TableDataModule, test: Batch, found: np.ndarray) -> None:
    """Draw what the user with the most test rows would be shown first, of one day."""
    table, schema = data.table("test"), data.schema
    if not schema.user or not schema.item:
        return
    counts = table[schema.user].drop_nulls().value_counts().sort("count", schema.user)
    rows = np.flatnonzero((table[schema.user] == counts[schema.user][-1]).to_numpy())[:LISTED]
    tasks = _shown(data, test.labels.mean(0).numpy())
    places = np.array([schema.task_names.index(task) for task in tasks])
    columns = [f"{TRUTH}{task}" for task in tasks]
    known = all(column in table.columns for column in columns)
    truth = table.select(columns).to_numpy()[rows] if known else None
    wanted = [task for task in tasks if task not in UNWANTED]
    fused = FusedScore(schema.task_names, dict.fromkeys(wanted, 1.0))
    score = fused.log(torch.from_numpy(found[rows])).numpy()
    figure = ranked_list_figure(
        [str(item) for item in table[schema.item].gather(rows)],
        tasks,
        found[np.ix_(rows, places)],
        true=truth,
        observed=test.labels.numpy()[np.ix_(rows, places)],
        scores=score,
    )
    page.section("One user's list")
    source = "; true probabilities are those of the simulator" if known else ""
    caption = (
        f"The first {len(rows)} test rows of the user with the most, ordered by the product of "
        f"the probabilities of {', '.join(wanted)}{source}."
    )
    page.figure(figure, caption, name="ranked-list")


def _experts(page: Page, comparison: Comparison, pieces: Sequence[Piece], own: Piece) -> None:
    reports = {}
    for piece in pieces:
        data, ranker = _ranker(comparison, piece)
        reports[piece.method] = report_of(ranker, data.batch("test"))
    if not any(report.layers for report in reports.values()):
        return
    page.section("Experts")
    page.figure(
        scales_figure(reports),
        "Standard deviation of the outputs of every expert: collapse spreads them.",
        name="expert-scales",
    )
    report = reports[own.method]
    if report.layers:
        who = own.method
        for name, figure, caption in (
            ("activations", activations_figure(report), f"{who}, expert by expert."),
            ("gates", gates_figure(report), f"{who}: mean weight that each gate gives."),
            ("sharing", sharing_figure(report), f"{who}: who uses the shared experts."),
        ):
            page.figure(figure, caption, name=name)
    for note in report.notes:
        page.text(note)


def _fields(page: Page, data: TableDataModule, ranker: Ranker) -> None:
    table = data.table("test")
    if len(table) > IMPORTANCE_ROWS:
        table = table.sample(IMPORTANCE_ROWS, seed=0)
    batch = data.transform.batch(table)

    def score(rows: pl.DataFrame) -> np.ndarray:
        return probabilities(ranker, data.transform.batch(rows))

    found = permutation_importance(
        score,
        table,
        data.schema.features,
        data.schema.task_names,
        batch.labels.numpy(),
        batch.user.numpy(),
        mask=batch.mask.numpy(),
        repeats=1,
        draws=user_resamples(batch.user.numpy(), resamples=200),
    )
    page.section("Fields")
    page.figure(
        importance_figure(found),
        f"What the summed log-loss gains if a field is permuted over {len(table):,} test rows.",
        name="importance",
    )


def _shown(data: TableDataModule, rates: np.ndarray) -> list[str]:
    """Return a few tasks, the most frequent of each category."""
    shown = []
    for category in data.schema.categories:
        own = [n for n, task in enumerate(data.schema.tasks) if task.category == category]
        shown += sorted(own, key=lambda n: -rates[n])[:PER_CATEGORY]
    return [data.schema.task_names[n] for n in sorted(shown)]
