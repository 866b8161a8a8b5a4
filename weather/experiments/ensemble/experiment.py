"""The ERA5 ensemble sample as an experiment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from harness.files import Data
from weather.baselines.assimilator import Assimilator
from weather.data.era5_sample import ATTRIBUTION, sample_data
from weather.data.tensors import to_dataset
from weather.data.write import write_wb2
from weather.experiments.ensemble.cases import case_errors, worst_case
from weather.experiments.ensemble.methods import ensemble_methods
from weather.experiments.ensemble.sample import (
    TASKS,
    TEST_TIMES,
    TRAINING_TIMES,
    EnsembleSample,
    EnsembleTask,
    kind_of,
)
from weather.experiments.ensemble.scores import REFERENCE, EnsembleScores
from weather.experiments.experiment import DENSITIES, Checks, Fit, Load, Trial, shown
from weather.experiments.method import OPTIMIZER_BOX, Method, Setting, Settings, choice_name
from weather.models.adas.forms import COMPARED
from weather.plots import analysis_figure
from weather.progress import Progress, silent

QUICK_CASES = 3
STORE = "era5_ensemble.zarr"


class EnsembleExperiment(EnsembleSample):
    """Tasks, methods, tuning and scores of the sample, see :class:`~..experiment.Experiment`."""

    forms = COMPARED
    reference = REFERENCE
    base = (REFERENCE,)
    decisive = ("seed",)
    pictures_file = "example.safetensors"
    attribution = ATTRIBUTION
    field = "z500"
    max_seeds: int | None = None
    max_cycles: int | None = None
    notes: tuple[str, ...] = (
        "The ERA5 sample has two test times, which n counts. Intervals are over the nine members "
        "at these times: they speak of other members, not of other weather.",
    )

    @property
    def headline(self) -> set[str]:
        """Metrics of tables: errors, and their ratios to those of the background."""
        return shown(self.channels, "rmse", "ratio")

    @property
    def observation_error(self) -> Tensor:
        """(C,) of ``persistence``."""
        return self.error_sd["persistence"]

    def tasks(self, densities: Sequence[float] = DENSITIES) -> list[EnsembleTask]:
        """Return both kinds at every density."""
        return [EnsembleTask(kind, density) for kind in TASKS for density in densities]

    def methods(self, task: str) -> list[Method]:
        """Return the classical methods for a task."""
        return ensemble_methods(self, kind_of(task))

    def background_error(self, task: str) -> Tensor:
        """Return the standard deviations (C,) of the background error in the training period."""
        return self.task_background_sd[kind_of(task)]

    def store(self, folder: Path) -> Path:
        """Return where :meth:`make` writes the sample."""
        return folder / STORE

    def make(self, folder: Path, progress: Progress = silent) -> Iterator[Path]:  # noqa: ARG002
        """Write the sample as a WeatherBench-2 store."""
        states = self.fields.transpose(0, 1)  # (T,N,C,H,W)
        dataset = to_dataset(states, self.channels, self.grid, times=self.times)
        yield write_wb2(dataset, self.store(folder), overwrite=True)

    def make_truth(self, progress: Progress = silent) -> None:
        """Nothing: the sample ships with the package."""

    def check(self) -> None:
        """Nothing: the sample ships with the package."""

    def data(self) -> list[Data]:
        """Return the shipped sample."""
        return sample_data()

    def digest(self) -> list[Data]:
        """Return the same: its content decides what is trained and scored."""
        return sample_data()

    def training_objects(self) -> list[str]:
        """Return all members at the times of training."""
        return self.objects(TRAINING_TIMES)

    def test_objects(self) -> list[str]:
        """Return all members at the times of testing."""
        return self.objects(TEST_TIMES)

    def trials(
        self,
        densities: Sequence[float],
        fit: Fit,
        *,
        cycles: int = 0,  # noqa: ARG002
    ) -> dict[str, Trial]:
        """Return what is tuned on cases of the training period.

        A form of Adas is tuned once, by the worst of its tasks.
        """
        found = {
            choice_name(method.name, task.name): Trial(
                method.box, partial(self._trial, task, method)
            )
            for kind in TASKS
            for method in ensemble_methods(self, kind)
            for task in (EnsembleTask(kind, density) for density in densities)
            if method.box
        }
        tasks = self.tasks(densities)
        for form in COMPARED:
            found[form] = Trial(OPTIMIZER_BOX, partial(self._network_trial, tasks, fit, form))
        return found

    def _trial(self, task: EnsembleTask, method: Method, setting: Setting) -> float:
        return self.tuning_score(task, method.build(setting))

    def _network_trial(
        self, tasks: Sequence[EnsembleTask], fit: Fit, form: str, setting: Setting
    ) -> float:
        network = fit(form, setting)
        return max(
            self.tuning_score(task, network.expecting(self.background_error(task.name)))
            for task in tasks
        )

    def tuning_score(self, task: EnsembleTask, assimilator: Assimilator) -> float:
        """Return what tuning minimizes: the worst case's mean RMSE over the background error."""
        errors = case_errors(self, task.kind, task.density, assimilator, tuning=True)
        return worst_case(errors, self.task_background_sd[task.kind])

    def scores(
        self,
        densities: Sequence[float],
        load: Load,
        seeds: Sequence[int],
        forms: Sequence[str],
        settings: Settings,
        *,
        quick: bool = False,
    ) -> EnsembleScores:
        """Return the evaluation on all test cases, or on three."""
        cases = QUICK_CASES if quick else None
        return EnsembleScores(self, densities, load, seeds, forms, settings, cases)

    def checks(self, scores: EnsembleScores) -> Sequence[Checks]:  # noqa: ARG002
        """Nothing more."""
        return ()

    def figures(self, pictures: Mapping[str, Tensor]) -> list[tuple[str, Figure]]:
        """Return a map panel of 500 hPa geopotential for each method, with its caption."""
        channel = self.channels.index("geopotential", 500)
        return [
            (
                f"{method}, 2 January 2017 12 UTC, member 9 is the truth",
                analysis_figure(
                    pictures["truth"][channel],
                    pictures["background"][channel],
                    pictures[method][channel],
                    self.grid,
                    variable="geopotential",
                    level=500,
                    observed=pictures["observed"].bool(),
                    title=f"{method}: geopotential at 500 hPa",
                ),
            )
            for method in ("adas_increment", "oi")
            if method in pictures
        ]
