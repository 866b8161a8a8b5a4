"""The model folder that ``score``, ``serve`` and ``loadtest`` work with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from core_gates.errors import GatesError
from harness.command.verbs import Place
from harness.experiment.piece import differences
from harness.experiment.record import read_record
from harness.runs.folder import RunFolder
from recsys.model_folder import load_model, read_settings
from recsys.table_scorer import TableScorer

MODEL = "model"
DIGITS = 12


class Model(NamedTuple):
    """A model in memory.

    Attributes:
        version: Name and hash of its folder.
        scorer: Scores tables.
    """

    version: str
    scorer: TableScorer


def read_model(folder: Path, *, int8: bool = False) -> Model:
    """Return the model of a folder.

    Args:
        folder: The folder.
        int8: Whether its tables take a byte per number in memory.

    Raises:
        GatesError: The folder holds no model, or a damaged one.
    """
    loaded = load_model(folder, int8=int8)
    version = f"{folder.resolve().name} {loaded.hash[:DIGITS]}{' int8' if int8 else ''}"
    return Model(version, TableScorer(loaded.ranker, loaded.transform, owned=True))


def refuse_infinite(found: Mapping[str, NDArray[Any]], version: str) -> None:
    """Refuse results of a model, by name, that are NaN or infinite.

    Raises:
        GatesError: One is.
    """
    for name, array in found.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            what = "a probability" if name == "p" else f"the {name}"
            raise GatesError(
                f"the model {version} gives {what} that is not finite: its training has diverged, "
                "train it again or serve another"
            )


def place_of(place: Place, model: str | None) -> Path:
    """Return where the model is: what was named, else the folder that ``fit`` has left.

    Raises:
        GatesError: There is none, or what is in the run folder is of another training than that
            which its record names.
    """
    found = Path(model) if model else place.run_folder.path / MODEL
    if not found.exists():
        way = "check the path" if model else "run `gates video fit` first, or name one by --model"
        raise GatesError(f"there is no model at {found}: {way}")
    if not model and (said := of_another_training(place.run_folder, found)):
        raise GatesError(
            f"{found} is no model of the training in {place.run_folder.training} ({said}): finish "
            f"that with `gates video fit`, or name this one by --model {found}"
        )
    return found


def of_another_training(run_folder: RunFolder, model: Path) -> str:
    """Return where a model's settings differ from those of the last training; empty if nowhere.

    They do where that training was stopped, has failed or was given up.
    """
    record = read_record(run_folder.training)
    if record is None:
        return "which has no record"
    return differences(read_settings(model).get("settings"), record.settings)


def chosen_tasks(known: Sequence[str], tasks: Sequence[str]) -> list[int]:
    """Return the places of tasks, of all if none is named.

    Raises:
        GatesError: One is unknown.
    """
    places: Mapping[str, int] = {name: place for place, name in enumerate(known)}
    if unknown := [name for name in tasks if name not in places]:
        raise GatesError(f"the model has no task {unknown[0]!r}; it has {', '.join(known)}")
    return [places[name] for name in tasks] or list(places.values())
