"""Networks and baselines of a contest as pieces of work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from core_gates.errors import GatesError
from harness.experiment import Job, Piece
from recsys.baselines import Predictor, WithIntercepts
from recsys.data.datamodule import TableDataModule
from recsys.experiments.building import data_of, module_of
from recsys.experiments.predictions import (
    Probabilities,
    baseline,
    check_finite,
    probabilities,
    summed_log_loss_of,
)
from recsys.module import MultiTaskModule
from recsys.ranker import Ranker
from recsys.transform import FeatureTransform

Places = Mapping[str, str]
"""Where files are on this machine, by dotted name: no part of what decides a result."""

MONITOR = "val/loss"
TRAINER = "trainer."
UNVALIDATED = "Early stopping conditioned on metric"  # Lightning's error
BASELINE = "baseline."
INTERCEPTS = "model.intercepts"
"""The one setting of networks that baselines have, too: all are calibrated, or none."""


def train(piece: Piece, job: Job, places: Places) -> dict[str, Tensor]:
    """Train one network until its validation loss no longer falls; return its best weights."""
    module, data = _trained(piece, job, places)
    rows = data.batch("validation")
    ranker = module.served(rows)
    check_finite(ranker, rows)
    return dict(ranker.state_dict())


def trial(piece: Piece, job: Job, places: Places) -> dict[str, float]:
    """Return the validation loss of a setting, summed over tasks; NaN if it diverges."""
    module, data = _trained(piece, job, places)
    rows = data.batch("validation")
    found = probabilities(module.served(rows), rows)
    return {"score": summed_log_loss_of(rows, found) if np.isfinite(found).all() else np.nan}


def ranker_of(piece: Piece, weights: Mapping[str, Tensor], data: TableDataModule) -> Ranker:
    """Return the network of a piece with its weights."""
    ranker = module_of(piece.settings).build(data.transform)
    ranker.load_state_dict(dict(weights))
    return ranker.eval()


def fit_baseline(piece: Piece, job: Job, places: Places) -> dict[str, Tensor]:
    """Fit a baseline and return its probabilities of the test rows."""
    data = data_of({**piece.settings, **places})
    job.note(objects=data.training_objects())
    return {"probabilities": torch.from_numpy(_fitted(piece, data, "test")).float()}


def try_baseline(piece: Piece, job: Job, places: Places) -> dict[str, float]:
    """Return the validation loss of a setting of a baseline."""
    del job
    data = data_of({**piece.settings, **places})
    found = _fitted(piece, data, "validation")
    return {"score": summed_log_loss_of(data.batch("validation"), found)}


def baseline_of(settings: Mapping[str, Any], transform: FeatureTransform) -> Predictor:
    """Return the unfitted baseline that settings name, with intercepts where networks have them.

    Raises:
        GatesError: The kind, a column or an argument is unknown, or an argument is wrong.
    """
    options = {
        name.removeprefix(BASELINE): value
        for name, value in settings.items()
        if name.startswith(BASELINE)
    }
    found = baseline(options, transform)
    return WithIntercepts(found) if settings.get(INTERCEPTS) else found


def _fitted(piece: Piece, data: TableDataModule, part: Any) -> Probabilities:
    predictor = baseline_of(piece.settings, data.transform)
    predictor.fit(data.batch("train"), data.batch("validation"))
    return predictor.predict(data.batch(part))


def _trained(piece: Piece, job: Job, places: Places) -> tuple[MultiTaskModule, TableDataModule]:
    L.seed_everything(piece.seed, verbose=False)
    data = data_of({**piece.settings, **places}, piece.seed or 0)
    module = module_of(piece.settings)
    job.note(objects=data.training_objects())
    trainer = {
        name.removeprefix(TRAINER): value
        for name, value in piece.settings.items()
        if name.startswith(TRAINER)
    }
    try:
        job.fit(module, data, monitor=MONITOR, patience=piece.get("patience"), **trainer)
    except RuntimeError as error:
        if UNVALIDATED not in str(error):
            raise
        raise GatesError(
            "the training ends before its first validation, which chooses the weights: raise "
            "trainer.max_steps, or lower trainer.val_check_interval"
        ) from error
    return module, data
