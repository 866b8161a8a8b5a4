"""``gates endoscopy evaluate`` and ``audit``: scores, and what a trained network relies on."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from apps.endoscopy.training_runs import (
    Trainings,
    checkpoint_bundle,
    decisive,
    make_ready,
    piece_of,
    trained,
)
from core_gates.errors import GatesError
from core_gates.monitor.hooks import GateMonitor
from endoscopy.bundles.bundle_fitting import frame_predictions
from endoscopy.data.frame_table import RENDERED, object_keys
from endoscopy.data.sizing_datamodule import Part, PolypSizingDataModule
from endoscopy.evaluation.audits import table_rows
from endoscopy.evaluation.baselines import DEGREES
from endoscopy.evaluation.honest_table import REFERENCE, HonestComparison
from endoscopy.evaluation.rendered_frames import rendered_features
from endoscopy.evaluation.size_evaluation import HEADLINE, Bars
from endoscopy.experiments.scored_predictions import (
    AUDIT,
    AUDITS,
    SHOWN,
    Audit,
    Budget,
    Evaluation,
    baseline_objects,
    kept_columns,
    mean_log_error,
    predicted_objects,
    sets_of,
)
from endoscopy.experiments.sizers import (
    MAIN,
    SHIFTS,
    Networks,
    Sizers,
    Training,
    rendering_settings,
    split_settings,
)
from endoscopy.renderer.scene import RendererConfig
from endoscopy.segmenter import shipped_segmenter
from harness.experiment import Choice, Job, Piece, Run, Store, Table
from harness.files import write_bytes
from harness.report.sections import save_gates
from harness.runs.terminal import ticking
from studies import Budget as StudyBudget
from studies import (
    generalization_study,
    generalization_table,
    planted_features_headline,
    planted_features_study,
    planted_features_table,
)
from studies.generalization import VARIANTS, LabeledImages, digits, fashion_mnist

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
        wanted = wanted._replace(variants=wanted.variants[:1], seeds=wanted.seeds[:1], bars=Bars())
        evaluation = _evaluation(run, sizers, networks, wanted)
    else:
        trainings = Trainings(run, sizers)
        evaluation = _evaluation(run, sizers, trainings.load, wanted)
        trained = trainings.obtain(evaluation.trainings(), sets)
        if run.quick:
            wanted = _complete(evaluation, wanted, trained)
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
    """Write the gate values of the first seed on test frames to the folder."""
    bundle, data = evaluation.bundles()[0], evaluation.sizers.datamodule
    with GateMonitor(bundle.model) as monitor:
        frame_predictions(bundle, data.frames(), data.evaluation_rows("test")[:64])
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


def _complete(evaluation: Evaluation, wanted: Wanted, trained: Sequence[Training]) -> Wanted:
    """Return the seeds and variants with trained networks.

    Raises:
        GatesError: There are none of the first variant.
    """
    lacking = {
        (training.variant, training.seed)
        for training in evaluation.trainings()
        if evaluation.sizers.resolved(training) not in trained
    }
    seeds = [s for s in wanted.seeds if (evaluation.main, s) not in lacking]
    if not seeds:
        raise GatesError(
            f"no trained network of {evaluation.main} is there: run fit, or evaluate without "
            "--quick, which trains"
        )
    variants = [v for v in wanted.variants if not any((v, s) in lacking for s in seeds)]
    return wanted._replace(variants=tuple(variants), seeds=seeds)


RUNS, BASELINES = "runs", "baselines"
HONEST, TUNING = "honest.parquet", "tuning.parquet"


def fixed(budget: Budget) -> dict[str, Any]:
    """Return the settings of every training run: the number of steps; the last weights are kept."""
    none = dict.fromkeys(("trainer.max_epochs", "checkpoint.monitor", "checkpoint.mode"))
    return {"trainer.max_steps": budget.steps, **none}


def spaces(budget: Budget, sizers: Sizers) -> dict[str, list[dict[str, float]]]:
    """Return the settings to try."""
    return {
        name: [{**trial, **sizers.version(name)} for trial in budget.trials[name]]
        for name in budget.variants
        if name in budget.trials
    }


def run_pieces(
    run: Run, sizers: Sizers, budget: Budget, chosen: Mapping[str, Choice]
) -> list[Piece]:
    """Return the pieces of all training runs: every variant, seed and number of objects."""
    settings = {name: fixed(budget) | dict(choice.setting) for name, choice in chosen.items()}
    return [
        piece_of(run, sizers, Training(name, seed, size), **settings.get(name, fixed(budget)))
        for size in budget.sizes
        for seed in budget.seeds
        for name in budget.variants
    ]


def baseline_pieces(sizers: Sizers, budget: Budget) -> list[Piece]:
    """Return one piece of work for each set of objects that the baselines are fitted to."""
    settings = split_settings(sizers.datamodule)
    if sizers.rendering is not None and "synthetic" in sizers.datamodule.sources:
        settings |= rendering_settings(sizers.rendering.config)
        settings["photometry.degrees"] = list(DEGREES)
    return [
        Piece(BASELINES, seed, {"n": size}, settings)
        for size in budget.sizes
        for seed in budget.seeds
    ]


def score_honest(run: Run, sizers: Sizers, budget: Budget) -> Path:
    """Tune, train and predict what is missing, and write and print the comparison."""
    budget.check()
    run.settings = decisive(run.settings, sizers)
    run.only = (*run.only, BASELINES) if run.only else ()
    epochs = partial(_epochs, sizers=sizers)
    ready = partial(make_ready, sizers)
    chosen = run.tune(
        spaces(budget, sizers),
        partial(trial, sizers=sizers),
        trials=len(budget.trials.get(REFERENCE, ())) or 1,
        ticks=epochs,
        prepare=ready,
        objects=budget.trial_objects,
        **fixed(budget),
    )
    store: Store[pd.DataFrame] = run.store(RUNS, Table())
    wanted = run_pieces(run, sizers, budget, chosen)
    work = partial(predicted, sizers=sizers)
    scored = run.obtain(store, wanted, work, ticks=epochs, prepare=ready)
    work = partial(baselines, sizers=sizers)
    fitted = run.obtain(store, baseline_pieces(sizers, budget), work, prepare=ready)
    lacking = {piece.method for piece in set(wanted) - set(scored)}
    complete = [piece for piece in scored if piece.method not in lacking]
    if not complete or len(fitted) < len(budget.sizes) * len(budget.seeds):
        raise GatesError("there is no training run to compare: evaluate without --quick")
    tested = tested_objects(sizers.datamodule, store.load(fitted[0]))
    scores = HonestComparison(
        _read(store, complete, tested), _read(store, fitted, tested), sizers.module.cut_offs
    )
    keep_table(scores.table, run.folder / HONEST)
    keep_table(tuning_table(chosen), run.folder / TUNING)
    return run.finish(
        scores.rows(),
        seeds=budget.seeds,
        data=sizers.datamodule.digest(),
        headline=scores.headline,
        notes=[f"{budget.steps} optimizer steps of every training."],
        others=OTHERS,
    )


def predicted(piece: Piece, job: Job, *, sizers: Sizers) -> pd.DataFrame:
    """Train the network of a piece and return its predictions for the test objects."""
    return kept_columns(_objects(piece, job, sizers, "test"))


def trial(piece: Piece, job: Job, *, sizers: Sizers) -> dict[str, float]:
    """Return the mean relative error of the validation objects."""
    return {"score": mean_log_error(_objects(piece, job, sizers, "validation"))}


def baselines(piece: Piece, job: Job, *, sizers: Sizers) -> pd.DataFrame:
    """Fit the baselines without a network and return their predictions for the test objects."""
    data = sizers.data(Training(seed=piece.seed or 0, objects=int(piece.keys["n"])))
    job.note(objects=data.training_objects())
    job.tick()
    return kept_columns(baseline_objects(data))


def tested_objects(data: PolypSizingDataModule, predicted: pd.DataFrame) -> list[str]:
    """Return short hashes of the test objects; of rendered ones the predictions suffice.

    Args:
        data: Where they come from.
        predicted: Of all of them, ``unique_id`` and ``gt``.
    """
    if list(data.sources) == ["synthetic"]:
        return object_keys(predicted.assign(database=RENDERED))
    return data.object_keys("test")


def tuning_table(chosen: Mapping[str, Choice]) -> pd.DataFrame | None:
    """Return the chosen settings, their scores and the number of trials; None without trials."""
    rows = [
        {
            "variant": variant,
            **{n: value for n, value in choice.setting.items() if n != "version"},
            "error": float(np.nanmin([trial["score"] for trial in choice.trials])),
            "trials": len(choice.trials),
        }
        for variant, choice in chosen.items()
        if choice.trials
    ]
    return pd.DataFrame(rows) if rows else None


def _objects(piece: Piece, job: Job, sizers: Sizers, part: Part) -> pd.DataFrame:
    module, data = trained(piece, job, sizers, max_epochs=_epochs(piece, sizers=sizers))
    return predicted_objects(module, data, part)


def _epochs(piece: Piece, *, sizers: Sizers) -> int:
    """Return the epochs that give the number of steps, rounded up."""
    objects = int(piece.keys.get("n", piece.get("objects")))
    return sizers.epochs(piece["trainer.max_steps"], objects)


def _read(
    store: Store[pd.DataFrame], pieces: Sequence[Piece], tested: Sequence[str]
) -> pd.DataFrame:
    """Return the predictions of pieces with variant, train_objects and seed."""
    tables = []
    for piece in pieces:
        table = store.load(piece, tested=tested)
        if "variant" not in table:
            table = table.assign(variant=piece.method)
        tables.append(table.assign(train_objects=int(piece.keys["n"]), seed=piece.seed))
    return pd.concat(tables, ignore_index=True)


Study = Literal[
    "audits", "shortcut", "masks", "boxes", "oracle_scale", "ladder", "planted", "generalization"
]
STUDIES = ("planted", "generalization")
AUDIT_FOLDER, CUES, CHUNK = "audits", "cues", 25
FASHION_IMAGES, STUDY_SEEDS = 6000, 5


def run_audit(networks: Trainings, study: Study, *, images: str, **options: Any) -> Path:
    """Render, train and run what an audit needs; return ``scores.json`` with its figures added.

    Args:
        networks: Networks of the run folder.
        study: Which.
        images: Of the study of generalization.
        options: Arguments of `Audit`.
    """
    run = networks.run
    if study in STUDIES:
        return run_study(run, study, images)
    audit = Audit(
        networks.sizers,
        networks.load,
        shipped_segmenter(),
        cues=partial(rendered_cues, run),
        **options,
    )
    names = supported(audit, AUDITS if study == "audits" else (study,))
    if needs := audit.needs(names):
        networks.obtain(needs, sets_of(names))
        networks.sizers.datamodule.setup("test")
    with ticking("auditing", len(names)) as tick:
        audit.run(names, tick)
    for name, table in audit.tables.items():
        keep_table(table, run.folder / AUDIT_FOLDER / f"{name}.parquet")
    for note in audit.notes:
        print(note)
    return run.finish(
        audit.rows(),
        audit.bars(),
        seeds=[audit.seed],
        part=tuple(f"{AUDIT}{name}" for name in audit.tables),
        metrics=SHOWN,
    )


def supported(audit: Audit, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the audits that the data support; print which ones they do not, and why.

    Raises:
        GatesError: The only audit cannot be run.
    """
    obstacles = {name: audit.obstacle(name) for name in names}
    for name, why in obstacles.items():
        if why and len(names) == 1:
            raise GatesError(f"--study {name} {why}")
        if why:
            print(f"{name} left out: it {why}", flush=True)
    return tuple(name for name, why in obstacles.items() if not why)


def rendered_cues(run: Run, config: RendererConfig, objects: range) -> dict[str, pd.DataFrame]:
    """Return the cues of objects by exposure, rendered once and then kept, without the frames."""
    settings = rendering_settings(config) | {"rendering.side": config.side}
    pieces = [
        Piece(CUES, config.seed, {"from": first, "to": end}, settings)
        for first, end in pairwise([*objects[::CHUNK], objects.stop])
    ]
    store = run.store(CUES, Table())
    run.obtain(store, pieces, partial(cues, config=config))
    cue_table = pd.concat([store.load(piece) for piece in pieces])
    return {
        str(name): exposure_cues.reset_index(drop=True)
        for name, exposure_cues in cue_table.groupby("exposure")
    }


def cues(piece: Piece, job: Job, *, config: RendererConfig) -> pd.DataFrame:
    """Render some objects and return the cues of their frames under both exposures."""
    features = rendered_features(config, range(int(piece.keys["from"]), int(piece.keys["to"])))
    job.tick()
    return pd.concat(
        [exposure_features.assign(exposure=name) for name, exposure_features in features.items()]
    )


def run_study(run: Run, study: str, images: str) -> Path:
    """Run a study of gates, which needs no data of this application."""
    if study == "planted":
        name, table = study, planted_features_table(planted_features_study())
        print(planted_features_headline(table))
    else:
        name, table = _generalization(images)
    keep_table(table, run.folder / AUDIT_FOLDER / f"{name}.parquet")
    task = f"{STUDY}{name}"
    rows = table_rows(name, table, task=task)
    return run.finish(rows, seeds=range(int(table["seeds"].max())), part=task, metrics=SHOWN)


def _generalization(images: str) -> tuple[str, pd.DataFrame]:
    data, name = _images(images), re.sub(r"\W+", "_", Path(images).absolute().name)
    budget = StudyBudget(num_train=FASHION_IMAGES) if len(data.train[0]) > FASHION_IMAGES else None
    seeds = range(STUDY_SEEDS)
    with ticking(f"training on {name}", len(seeds) * len(VARIANTS)) as tick:
        study = generalization_study(data, seeds=seeds, budget=budget, tick=tick)
    return f"generalization_{name}", generalization_table(study)


def _images(images: str) -> LabeledImages:
    if images == "digits":
        return digits()
    return fashion_mnist() if images == "fashion_mnist" else fashion_mnist(images)
