"""``gates endoscopy audit``: what a trained network relies on, and studies of gates."""

import re
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from apps.endoscopy.size_scoring import STUDY, keep_table
from apps.endoscopy.training_runs import Trainings
from core_gates.errors import GatesError
from endoscopy.evaluation.audits import table_rows
from endoscopy.evaluation.rendered_frames import rendered_features
from endoscopy.experiments.scored_predictions import AUDIT, AUDITS, SHOWN, Audit, sets_of
from endoscopy.experiments.sizers import rendering_settings
from endoscopy.renderer.scene import RendererConfig
from endoscopy.segmenter import shipped_segmenter
from harness.experiment import Job, Piece, Run, Table
from harness.runs.terminal import ticking
from studies import (
    Budget,
    generalization_study,
    generalization_table,
    planted_features_headline,
    planted_features_study,
    planted_features_table,
)
from studies.generalization import VARIANTS, LabeledImages, digits, fashion_mnist

Study = Literal[
    "audits", "shortcut", "masks", "boxes", "oracle_scale", "ladder", "planted", "generalization"
]
STUDIES = ("planted", "generalization")
FOLDER, CUES, CHUNK = "audits", "cues", 25
FASHION_IMAGES, STUDY_SEEDS = 6000, 5


def run_audit(networks: Trainings, study: Study, *, images: str, **options: Any) -> Path:
    """Render and train what an audit needs, run it, and add its figures to the scores.

    Args:
        networks: Networks of the run folder.
        study: Which.
        images: Of the study of generalization.
        options: Arguments of :class:`Audit`.
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
        keep_table(table, run.folder / FOLDER / f"{name}.parquet")
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
    found = pd.concat([store.load(piece) for piece in pieces])
    return {str(name): one.reset_index(drop=True) for name, one in found.groupby("exposure")}


def cues(piece: Piece, job: Job, *, config: RendererConfig) -> pd.DataFrame:
    """Render some objects and return the cues of their frames under both exposures."""
    found = rendered_features(config, range(int(piece.keys["from"]), int(piece.keys["to"])))
    job.tick()
    return pd.concat([one.assign(exposure=name) for name, one in found.items()])


def run_study(run: Run, study: str, images: str) -> Path:
    """Run a study of gates, which needs no data of this application."""
    if study == "planted":
        name, table = study, planted_features_table(planted_features_study())
        print(planted_features_headline(table))
    else:
        name, table = _generalization(images)
    keep_table(table, run.folder / FOLDER / f"{name}.parquet")
    task = f"{STUDY}{name}"
    rows = table_rows(name, table, task=task)
    return run.finish(rows, seeds=range(int(table["seeds"].max())), part=task, metrics=SHOWN)


def _generalization(images: str) -> tuple[str, pd.DataFrame]:
    data, name = _images(images), re.sub(r"\W+", "_", Path(images).absolute().name)
    budget = Budget(num_train=FASHION_IMAGES) if len(data.train[0]) > FASHION_IMAGES else None
    seeds = range(STUDY_SEEDS)
    with ticking(f"training on {name}", len(seeds) * len(VARIANTS)) as tick:
        found = generalization_study(data, seeds=seeds, budget=budget, tick=tick)
    return f"generalization_{name}", generalization_table(found)


def _images(images: str) -> LabeledImages:
    if images == "digits":
        return digits()
    return fashion_mnist() if images == "fashion_mnist" else fashion_mnist(images)
