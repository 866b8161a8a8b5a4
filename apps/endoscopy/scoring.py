"""``gates endoscopy evaluate``: render and train what is missing, score, write, print."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from apps.endoscopy.training import Trainings, checkpoint_bundle, make_ready
from core_gates.errors import GatesError
from core_gates.monitor.hooks import GateMonitor
from endoscopy.bundles.building import frame_predictions
from endoscopy.evaluation.size_evaluation import HEADLINE, Bars
from endoscopy.experiments.audit import AUDIT
from endoscopy.experiments.evaluation import Evaluation
from endoscopy.experiments.rendered_sets import MAIN, SHIFTS
from endoscopy.experiments.sizers import Networks, Sizers, Training
from harness.experiment import Run
from harness.files import write_bytes
from harness.report.gates import save_gates
from harness.runs.ticker import ticking

PREDICTIONS, SUBGROUPS = "predictions.parquet", "subgroups.parquet"
STUDY = "study: "
OTHERS = (AUDIT, STUDY)
"""Beginnings of the tasks and bars of other verbs than ``evaluate``."""

RESAMPLES, QUICK_RESAMPLES = 2000, 300


class Wanted(NamedTuple):
    """What is scored; see the options of the verb."""

    variants: tuple[str, ...]
    seeds: Sequence[int]
    folds: Sequence[int]
    shifts: Sequence[str]
    bars: Bars


def score(run: Run, sizers: Sizers, wanted: Wanted, *, pinned: str | None) -> Path:
    """Score every variant and write scores, tables and the data of the report.

    Args:
        run: Where everything is kept.
        sizers: The networks.
        wanted: What is scored.
        pinned: A checkpoint instead of all seeds of the first variant.
    """
    if unknown := [name for name in wanted.shifts if name not in SHIFTS]:
        raise GatesError(
            f"evaluate.shifts {', '.join(unknown)} is unknown: choose from {', '.join(SHIFTS)}"
        )
    sets = (MAIN, *wanted.shifts)
    networks: Networks
    if pinned:
        make_ready(sizers, sets)
        networks = sizers.pinned(checkpoint_bundle(sizers, Path(pinned)))
        first = wanted.variants[:1]
        wanted = wanted._replace(variants=first, seeds=wanted.seeds[:1], bars=Bars())
        evaluation = _evaluation(run, sizers, networks, wanted)
    else:
        trainings = Trainings(run, sizers)
        evaluation = _evaluation(run, sizers, trainings.load, wanted)
        found = trainings.obtain(evaluation.trainings(), sets)
        if run.quick:
            wanted = _complete(evaluation, wanted, found)
            evaluation = _evaluation(run, sizers, trainings.load, wanted)
    sizers.datamodule.setup("test")
    with ticking("predicting", evaluation.ticks(wanted.shifts)) as tick:
        evaluation.run(wanted.shifts, tick)
    scores = evaluation.scores
    with ticking("bootstrap", len(scores.pairs())) as tick:
        rows = scores.rows(tick)
    keep_table(scores.table(), run.folder / PREDICTIONS)
    keep_table(scores.subgroups(), run.folder / SUBGROUPS)
    watch_gates(evaluation, run.folder)
    return run.finish(
        rows,
        scores.bars(wanted.bars),
        seeds=wanted.seeds,
        data=sizers.datamodule.digest(),
        headline=scores.headline,
        notes=[scores.note],
        metrics=HEADLINE,
        others=OTHERS,
    )


def keep_table(table: pd.DataFrame | None, path: Path) -> None:
    """Keep a table as Parquet, or remove that of an earlier evaluation."""
    if table is None:
        path.unlink(missing_ok=True)
    else:
        write_bytes(path, table.to_parquet(None, index=False))


def watch_gates(evaluation: Evaluation, folder: Path) -> None:
    """Keep the values of the gates of the first seed on some test frames."""
    bundle, data = evaluation.bundles()[0], evaluation.sizers.datamodule
    rows = data.evaluation_rows("test")[:64]
    with GateMonitor(bundle.model) as monitor:
        frame_predictions(bundle, data.frames(), rows)
        save_gates(monitor, folder)


def _evaluation(run: Run, sizers: Sizers, networks: Networks, wanted: Wanted) -> Evaluation:
    return Evaluation(
        sizers,
        networks,
        wanted.variants,
        wanted.seeds,
        wanted.folds,
        sizers.module.cut_offs,
        QUICK_RESAMPLES if run.quick else RESAMPLES,
    )


def _complete(evaluation: Evaluation, wanted: Wanted, found: Sequence[Training]) -> Wanted:
    """Return the seeds and variants with trained networks.

    Raises:
        GatesError: There are none of the first variant.
    """
    resolved = evaluation.sizers.resolved
    lacking = {
        (one.variant, one.seed) for one in evaluation.trainings() if resolved(one) not in found
    }
    seeds = [s for s in wanted.seeds if (evaluation.main, s) not in lacking]
    if not seeds:
        raise GatesError(
            f"no trained network of {evaluation.main} is there: run fit, or evaluate without "
            "--quick, which trains"
        )
    variants = [v for v in wanted.variants if not any((v, s) in lacking for s in seeds)]
    return wanted._replace(variants=tuple(variants), seeds=seeds)
