"""Pieces of ``gates weather``: what names a network, a choice and a cycle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.experiment import Piece, Run
from weather.experiments.experiment import Experiment, Work
from weather.experiments.method import Setting
from weather.models.adas.forms import FORMS

NETWORK, SOURCE = "model.network.init_args", "data.source.init_args"
NEUTRAL = (
    f"{SOURCE}.recording", f"{SOURCE}.world.init_args.path", f"{SOURCE}.store", f"{SOURCE}.cache",
    f"{NETWORK}.recompute",
)  # fmt: skip
"""Options that decide no result: paths of data whose content or settings count, and memory."""

SOURCE_SEED = f"{SOURCE}.seed"
BUDGET = ("cycles", "steps", "densities")
"""Settings of a choice that describe its search."""


def form_of(settings: Mapping[str, Any]) -> str | None:
    """Return the form of a configured network, None if it is none of those that are compared."""
    for form, changes in FORMS.items():
        if all(settings.get(f"{NETWORK}.{name}") == value for name, value in changes.items()):
            return form
    return None


def network_piece(
    run: Run, form: str, seed: int, optimizer: Mapping[str, float] | None = None
) -> Piece:
    """Return a network of a form and a seed.

    Args:
        run: Whose configuration it has.
        form: Name of the form.
        seed: Of weights, order and source.
        optimizer: Tuned settings; those of the configuration where there are none.
    """
    settings = {f"{NETWORK}.{name}": value for name, value in FORMS[form].items()}
    settings |= {f"model.{name}": value for name, value in (optimizer or {}).items()}
    return run.piece(form, seed, **{**settings, SOURCE_SEED: None, "seed_everything": None})


def fit_piece(run: Run) -> Piece | None:
    """Return what ``fit`` trains, as ``evaluate`` names it; None for a network of no form."""
    given, seed = run.settings.pop("seed", 0), run.settings.get(SOURCE_SEED, 0)
    form = form_of(run.settings)
    if form is None:
        return None
    piece = network_piece(run, form, seed)
    if given == seed:
        return piece
    return Piece(form, seed, settings={**piece.settings, "seed_everything": given})


def world_alone(run: Run, experiment: Experiment) -> dict[str, None]:
    """Return settings that remove all but those of truth and classical methods."""
    kept = ["data.source.class_path", "data.digest"]
    kept += [f"{SOURCE}.{name}" for name in experiment.decisive]
    return {
        name: None
        for name in run.settings
        if not any(name == one or name.startswith(f"{one}.") for one in kept)
    }


def without_training(run: Run) -> dict[str, None]:
    """Return settings that remove all in which a trial differs from a training run."""
    own = ("trainer.", "checkpoint.", "data.steps", "data.validation_", "start")
    names = [name for name in run.settings if name.startswith(own)]
    names += [SOURCE_SEED, "model.learning_rate", "model.weight_decay"]
    return dict.fromkeys([*names, *(f"{NETWORK}.{name}" for name in FORMS["open_gate"])])


def work_piece(
    run: Run,
    experiment: Experiment,
    work: Work,
    setting: Setting,
    start: list[str] | None,
) -> Piece:
    """Return the cycles or cases of a method on a task.

    Args:
        run: Whose configuration it has.
        experiment: Truth and methods.
        work: Method, task and scope.
        setting: Of a classical method.
        start: Fingerprints of the networks of a form.
    """
    tuned = {f"setting.{name}": value for name, value in setting.items()}
    settings: dict[str, Any] = {**world_alone(run, experiment), "start": start, **tuned}
    return run.piece(work.method, None, {"task-": work.task, **dict(work.scope)}, **settings)
