"""What ``fit`` leaves: weights among the results of the run, and a model folder to be used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from apps.video.serving.model import MODEL
from harness.experiment import Arrays, Piece, Run
from harness.runs.checkpoint import load_weights
from harness.runs.folder import RunFolder
from recsys.data.datamodule import TableDataModule
from recsys.experiments.building import module_of
from recsys.experiments.predictions import check_finite
from recsys.model_folder import save_model


def keep_model(
    folder: RunFolder, run: Run, piece: Piece, objects: Sequence[str], data: TableDataModule
) -> Path | None:
    """Keep the best weights of a training run; return its model folder, None without a checkpoint.

    Args:
        folder: Of the run.
        run: Its results.
        piece: What was trained.
        objects: Short hashes of what it was trained on.
        data: Whose transform the model folder holds.

    Raises:
        GatesError: The training has diverged.
    """
    path = folder.best_checkpoint or folder.last_checkpoint
    if path is None:
        return None
    module = module_of(piece.settings)
    module.build(data.transform)
    module.load_state_dict(load_weights(path)["state_dict"])
    rows = data.batch("validation")
    ranker = module.served(rows)
    check_finite(ranker, rows)
    run.store("weights", Arrays()).keep(piece, ranker.state_dict(), objects=objects)
    settings = {"settings": piece.settings, "training_objects": list(objects)}
    return save_model(run.folder / MODEL, ranker, data.transform, settings)
