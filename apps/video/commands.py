"""``gates video``: HoME and its rivals on logs of short video, from tables to a service.

Verbs that are functions do not wait for Lightning and what only comparisons need.
"""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core_gates.errors import GatesError
from harness.command.verbs import FunctionVerb, Place, run_verb
from harness.experiment import differences, read_record
from recsys.model_folder import read_settings

MODEL = "model"
DEFAULT_CONFIG = "tiny"  # of verbs that need no data
TRAINERS = "apps.video.training_verbs"  # of the other verbs: it imports Lightning
FUNCTIONS = {
    "prepare": FunctionVerb("apps.video.prepare:prepare", "sources"),
    "simulate": FunctionVerb("apps.video.prepare:simulate"),
    "score": FunctionVerb("apps.video.score:score", "sources"),
    "export": FunctionVerb("apps.video.serving:export"),
    "serve": FunctionVerb("apps.video.serving:serve"),
    "loadtest": FunctionVerb("apps.video.serving:loadtest"),
    "plan": FunctionVerb("apps.video.plan:plan"),
}
"""Verbs that need neither data nor a Trainer."""


def place_of(place: Place, model: str | None) -> Path:
    """Return where the model is: what was named, else the folder that ``fit`` has left.

    Raises:
        GatesError: There is none, or what is in the run folder is of another training than that
            which its record names.
    """
    model_path = Path(model) if model else place.run_folder.path / MODEL
    if not model_path.exists():
        way = "check the path" if model else "run `gates video fit` first, or name one by --model"
        raise GatesError(f"there is no model at {model_path}: {way}")
    if model:
        return model_path
    record = read_record(place.run_folder.training)
    said = "which has no record"
    if record is not None:  # they differ if that training was stopped, has failed, was given up
        said = differences(read_settings(model_path).get("settings"), record.settings)
    if said:
        raise GatesError(
            f"{model_path} is no model of the training in {place.run_folder.training} ({said}): "
            f"finish that with `gates video fit`, or name this one by --model {model_path}"
        )
    return model_path


def run_of_model(options: Mapping[str, Any]) -> str | None:
    """Return the name of the run of a named model: that which made it, else that of its folder."""
    if not options.get("model"):
        return None
    path = Path(options["model"]).absolute()
    return (path.parent.name if path.name == MODEL else path.stem) or None


def main(arguments: Sequence[str]) -> None:
    """Run one verb."""
    if arguments[0] in FUNCTIONS:
        run_verb("video", FUNCTIONS, arguments, config=DEFAULT_CONFIG, name_of=run_of_model)
        return
    importlib.import_module(TRAINERS).run_training_verb(arguments)
