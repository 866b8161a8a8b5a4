"""Tuning: what is searched, and what a trial is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from apps.weather.networks import Training, fitted
from apps.weather.pieces import BUDGET, without_training, world_alone
from harness.experiment import Choice, Job, Piece, Run
from weather.baselines.assimilator import Assimilator
from weather.experiments.experiment import Experiment
from weather.experiments.method import (
    Method,
    Setting,
    Settings,
    built,
    choice_name,
    is_stored,
)
from weather.models.adas.analysis import AdasAnalysis
from weather.models.adas.forms import COMPARED

SEED = 0  # of the trials


@dataclass(frozen=True)
class Budget:
    """How long every method is tuned.

    Args:
        trials: Trials of every method.
        densities: Fractions of grid points observed in the trials of networks.
        cycles: Cycles of a trial in a twin world.
        trial_steps: Training steps of a trial of a network.
    """

    trials: int = 8
    densities: tuple[float, ...] = (0.1, 0.01)
    cycles: int = 160
    trial_steps: int = 300


class Tuning:
    """Tunes the methods of an experiment.

    Args:
        experiment: Whose methods.
        training: Trains networks for a few steps.
        densities: Fractions of grid points observed, for classical methods.
        budget: The same for every method.
    """

    def __init__(
        self,
        experiment: Experiment,
        training: Training,
        densities: Sequence[float],
        budget: Budget,
    ) -> None:
        self.experiment, self.training = experiment, training
        self.densities, self.budget = tuple(densities), budget

    def classical(self, run: Run) -> dict[str, Choice]:
        """Return the choice of every classical method for every task."""
        trials = self.experiment.trials(self.densities, _refuse, cycles=self.budget.cycles)
        spaces = {name: trial.box for name, trial in trials.items() if "@" in name}
        world = world_alone(run, self.experiment)
        return run.tune(spaces, self.trial, trials=self.budget.trials, seed=SEED,
                        **{**world, **self._cycles()})  # fmt: skip

    def networks(self, run: Run, forms: Sequence[str], seeds: Sequence[int]) -> dict[str, Choice]:
        """Return the choice of every form; in a quick run, those that exist.

        Forms of which ``fit`` trained a network with the configured optimizer are not tuned.
        """
        configured = fitted(run, forms, seeds)
        if configured:
            names = ", ".join(configured)
            print(f"of `fit`, with the optimizer of the configuration: {names}", flush=True)
        wanted = [form for form in COMPARED if form in forms and form not in configured]
        if "open_gate" in forms and "open_gate" not in configured:
            wanted = list(dict.fromkeys([*wanted, "adas_increment"]))
        if run.quick:
            return chosen_networks(run, wanted)
        trials = self.experiment.trials(self.densities, _refuse, cycles=self.budget.cycles)
        steps, densities = self.budget.trial_steps, list(self.budget.densities)
        own = {"steps": steps, "densities": densities, **self._cycles()}
        return run.tune({form: trials[form].box for form in wanted}, self.trial,
                        trials=self.budget.trials, seed=SEED, ticks=steps,
                        prepare=self.training.prepare,
                        **{**without_training(run), **own})  # fmt: skip

    def trial(self, piece: Piece, job: Job) -> dict[str, float]:
        """Return the score of a setting, NaN where the method refuses it."""

        def fit(form: str, setting: Setting) -> AdasAnalysis:  # noqa: ARG001
            short = {"max_epochs": 1, "limit_val_batches": 0}
            return self.training.fit(piece, job, setting, piece["steps"], **short)

        task, densities = piece.keys.get("task-"), piece.get("densities", self.densities)
        name = choice_name(piece.method, str(task)) if task else piece.method
        trials = self.experiment.trials(densities, fit, cycles=piece.get("cycles", 0))
        box, score = trials[name]
        try:
            return {"score": score({axis: piece[axis] for axis in box})}
        except ValueError:  # beyond the box there are settings that no method takes
            return {"score": math.nan}

    def _cycles(self) -> dict[str, Any]:
        return {} if self.experiment.max_cycles is None else {"cycles": self.budget.cycles}


def chosen_networks(run: Run, forms: Sequence[str]) -> dict[str, Choice]:
    """Return the choices of forms that were tuned before, with whatever budget."""
    return run.chosen(forms, seed=SEED, budget=BUDGET, **without_training(run))


def chosen_methods(run: Run, experiment: Experiment, names: Sequence[str]) -> dict[str, Choice]:
    """Return the choices of classical methods that were tuned before, with whatever budget."""
    return run.chosen(names, seed=SEED, budget=BUDGET, **world_alone(run, experiment))


def settings_of(choices: Mapping[str, Choice]) -> Settings:
    """Return the settings alone."""
    return {name: choice.setting for name, choice in choices.items()}


def tuned(settings: Settings, method: Method, task: str) -> Assimilator:
    """Return a method with its tuned setting, or, with a warning, with the middle of its box.

    Raises:
        GatesError: It refuses the setting.
    """
    if method.box and not is_stored(settings, method, task):
        print(
            f"{choice_name(method.name, task)} was never tuned and uses the middle of its range; "
            "`gates weather tune` finds a better setting",
            flush=True,
        )
    return built(settings, method, task)


def _refuse(form: str, setting: Setting) -> NoReturn:
    raise AssertionError(f"{form} is not to be trained with {setting}")
