"""A twin world as an experiment: what is tuned and scored on a few timelines, without bars."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType

from matplotlib.figure import Figure
from torch import Tensor

from harness.files import Data
from weather.experiments.experiment import (
    DENSITIES,
    OPTIMIZER_BOX,
    Checks,
    Fit,
    Load,
    Method,
    Setting,
    Settings,
    Trial,
    choice_name,
    shown,
)
from weather.experiments.twin.twin_scores import REFERENCE, TwinScores
from weather.experiments.twin.twin_tasks import (
    TwinEvaluation,
    TwinMethods,
    TwinTask,
    twin_tasks,
)
from weather.experiments.twin.world import TwinWorld
from weather.plots import cycle_figures
from weather.progress import Progress, silent

QUICK_CYCLES = 30
FORMS = ("adas_increment", "ungated")


class TwinExperiment:
    """Tasks, methods, tuning and scores of a world, see :class:`~..experiment.Experiment`.

    Args:
        world: Nature, forecast models and observation errors.
    """

    forms = FORMS
    reference = REFERENCE
    base = ("free_run",)
    decisive = ("world",)
    pictures_file = "cycles.safetensors"
    attribution = ""
    notes: tuple[str, ...] = (
        "Lost timelines are scored as the free run. In the perfect model the free run is the truth "
        "of 24 hours before, as it starts there, and not an independent trajectory of the model: "
        "lost timelines are scored too well by it.",
        "Optimal interpolation takes its covariances from day differences, while networks train on "
        "recorded backgrounds with their truths: the two were not given the same data.",
    )

    def __init__(self, world: TwinWorld) -> None:
        self.world = world
        self.grid, self.channels = world.grid, world.channels

    @property
    def headline(self) -> set[str]:
        """Metrics of tables: errors and lost timelines."""
        return shown(self.channels, "rmse") | {"lost"}

    @property
    def field(self) -> str:
        """Label of the first channel."""
        return self.channels.labels[0]

    @property
    def max_seeds(self) -> int:
        """Timelines for testing, one a seed."""
        return len(self.world.members["test"])

    @property
    def max_cycles(self) -> int:
        """Cycles of a timeline."""
        return self.world.cycles

    @property
    def observation_error(self) -> Tensor:
        """(C,) of the world."""
        return self.world.error_sd

    def tasks(self, densities: Sequence[float] = DENSITIES) -> list[TwinTask]:
        """Return both forecast models at every density."""
        return twin_tasks(densities)

    def methods(self, task: str) -> list[Method]:  # noqa: ARG002
        """Return the classical methods, the same for all tasks."""
        return TwinMethods(self.world).all()

    def background_error(self, task: str) -> None:
        """Return None: one network, with its own estimate, serves all tasks."""

    def store(self, folder: Path) -> Path:  # noqa: ARG002
        """Return the nature run."""
        return self.world.path

    def make_truth(self, progress: Progress = silent) -> None:
        """Run nature, or the rest of it, where it is missing."""
        world = self.world
        if not world.path.exists():
            with progress("nature run", world.calls) as tick:
                world.prepare(progress=lambda *_: tick())
        world.prepare()

    def data(self) -> list[Data]:
        """Return the nature run."""
        return [Data.of(self.world.path.name, "truth", self.world.path)]

    def training_objects(self) -> list[str]:
        """Return the members for training, and those for validation, which choose weights."""
        return self.world.objects("training", "validation")

    def test_objects(self) -> list[str]:
        """Return the members for testing."""
        return self.world.objects("test")

    def trials(
        self,
        densities: Sequence[float],
        fit: Fit,
        *,
        cycles: int,
        settings: Settings = MappingProxyType({}),  # noqa: ARG002
    ) -> dict[str, Trial]:
        """Return what is tuned on the tuning timelines.

        Classical methods are tuned for every density and forecast model; the learning rate and
        weight decay of a form of Adas once, by the geometric mean over the tasks: the worst of
        them is often lost after so few steps, and then carries no information.
        """
        evaluation = TwinEvaluation(self.world, densities, cycles)
        found = {
            choice_name(method.name, task.name): Trial(
                method.box, partial(_trial, evaluation, method, task)
            )
            for method in evaluation.classical()
            for task in evaluation.tasks
            if method.box
        }
        for form in FORMS:
            found[form] = Trial(OPTIMIZER_BOX, partial(_network_trial, evaluation, fit, form))
        return found

    def scores(
        self,
        densities: Sequence[float],
        load: Load,
        seeds: Sequence[int],
        forms: Sequence[str],
        settings: Settings,
        *,
        quick: bool = False,
    ) -> TwinScores:
        """Return the evaluation on the test timelines, quickly on 30 cycles of them."""
        evaluation = TwinEvaluation(
            self.world, densities, min(QUICK_CYCLES, self.world.cycles) if quick else None
        )
        return TwinScores(evaluation, load, seeds, forms, settings)

    def checks(self, scores: TwinScores) -> Sequence[Checks]:  # noqa: ARG002
        """Return nothing: all is among the scores."""
        return ()

    def figures(self, pictures: Mapping[str, Tensor]) -> list[tuple[str, Figure]]:
        """Return the error of every method over the cycles, one figure per task."""
        caption = "Median over seeds and their range, {task}; lost timelines are the free run."
        return cycle_figures(pictures, self.channels, self.world.hours, caption)


def _trial(evaluation: TwinEvaluation, method: Method, task: TwinTask, setting: Setting) -> float:
    return evaluation.tuning_score(task, method.build(setting))


def _network_trial(evaluation: TwinEvaluation, fit: Fit, form: str, setting: Setting) -> float:
    network = fit(form, setting)
    return statistics.geometric_mean(
        evaluation.tuning_score(task, network) for task in evaluation.tasks
    )
