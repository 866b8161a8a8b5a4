"""``gates video``: HoME and its rivals on logs of short video, from tables to a service.

Verbs that are functions do not wait for Lightning and what only comparisons need.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apps.video.serving.model import MODEL
from harness.command.verbs import FunctionVerb, run_verb

DEFAULT_CONFIG = "tiny"  # of verbs that need no data
TRAINERS = "apps.video.training_verbs"  # of the other verbs: it imports Lightning
FUNCTIONS = {
    "prepare": FunctionVerb("apps.video.prepare:prepare", "sources"),
    "simulate": FunctionVerb("apps.video.simulate:simulate"),
    "score": FunctionVerb("apps.video.score:score", "sources"),
    "export": FunctionVerb("apps.video.export:export"),
    "serve": FunctionVerb("apps.video.serve:serve"),
    "loadtest": FunctionVerb("apps.video.loadtest:loadtest"),
    "plan": FunctionVerb("apps.video.plan:plan"),
}
"""Verbs that need neither data nor a Trainer."""


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
