"""Assimilation problems from pairs of real ERA5 ensemble fields, and scores on them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from harness.evidence import Bar, Interval, Resamples, Row, Scores
from harness.files import Data
from weather.data.axes import to_dataset
from weather.data.shipped import ATTRIBUTION, sample_data
from weather.data.writing import write_wb2
from weather.experiments.cases import (
    QUICK_CASES,
    REFERENCE,
    CaseExperiment,
    CaseScores,
    Situation,
)
from weather.experiments.ensemble.ensemble_sample import (
    TASKS,
    TEST_TIMES,
    TRAINING_TIMES,
    Case,
    EnsembleSample,
    EnsembleTask,
    ensemble_methods,
    gates_by_time,
    kind_of,
)
from weather.experiments.experiment import (
    DENSITIES,
    UNMEASURED,
    Load,
    Method,
    Settings,
    Task,
    Work,
    shown,
)
from weather.metrics import joined
from weather.models.adas.presets import FORMS
from weather.observations.gridded import GriddedObservations
from weather.progress import Progress, Tick, no_tick, silent
from weather.training.stream import AssimilationBatch, generator


class EnsembleScores(CaseScores[Case]):
    """Score every method on every test case; the errors of a form are means over its seeds."""

    source: Era5EnsembleSource
    withheld, gap = 11, 6

    def scope(self, task: str) -> tuple[tuple[str, str | int], ...]:  # noqa: ARG002
        """Return how many cases there are, if not all."""
        return () if self.chosen.stop is None else (("first", self.chosen.stop),)

    def compute(self, work: Work, tick: Tick = no_tick) -> dict[str, Tensor]:
        """Return the errors (N,C) of a method on a task, and its departures, by name."""
        tensors = super().compute(work, tick)
        return {**tensors, "errors": tensors["errors"].mean(0)}

    def take(self, work: Work, found: Mapping[str, Tensor]) -> None:
        """Store the tensors that `compute` returned."""
        super().take(work, {**found, "errors": found["errors"][None]})

    def draws(self, task: str) -> Resamples:
        """Return bootstrap resamples of the members of a task."""
        return Resamples.clusters(case.member for case in self.cases(task))

    def score(self, own: Tensor, base: Tensor) -> Scores:
        """Return RMSE and ratio to the background by channel, from two square errors (N,C)."""
        errors, ratios = self.channel_scores(own, base)
        return joined([*errors, *ratios])

    def compared(self, task: str) -> list[Row]:
        """Return RMSE and ratio to the background, with intervals over members, and differences.

        Only two times exist, and ``n`` counts them: the intervals speak of other members at these
        times, not of other weather, and the p of a difference is at least that of a sign test over
        the times.
        """
        # Times are the units that are independent of each other.
        times = len({case.time for case in self.cases(task)})
        smallest = 2.0 ** (1 - times)
        return [row._replace(n=times, p=max(row.p, smallest)) for row in super().compared(task)]

    def task_rows(self, task: str) -> list[Row]:
        """Return the rows of a task, and the comparison of gates at every time."""
        errors = {method: pair[0] for method, pair in self.task_errors(task).items()}
        labels = self.source.channels.labels
        gates = gates_by_time(task, self.cases(task), self.source.times, errors, labels)
        return super().task_rows(task) + gates

    def _ratio(self, task: str, method: str, base: str) -> list[Interval]:
        """Return the RMSE of a method over that of another, for every channel."""
        errors, other = self.errors[task, method][0], self.errors[task, base][0]
        _, ratios = self.channel_scores(errors, other)
        return list(self.draws(task).intervals(joined(ratios)).values())

    def bars(self) -> list[Bar]:
        """Return the criteria that scores at the largest density must meet."""
        dense = max(task.density for task in self.tasks)
        persistence, ensemble = (EnsembleTask(kind, dense).name for kind in TASKS)

        def beats(method: str, task: str) -> Bar:
            worst = max(ratio.value for ratio in self._ratio(task, method, REFERENCE))
            return Bar(f"{method} over background, worst field, {task}", worst, "<=", 1.0)

        upper = to_oi = math.nan
        note = "" if "adas_increment" in self.forms else UNMEASURED
        if not note:
            upper = max(r.high for r in self._ratio(persistence, "adas_increment", REFERENCE))
            to_oi = max(r.value for r in self._ratio(persistence, "adas_increment", "oi"))
        return [
            beats("oi", persistence),
            Bar(f"adas_increment over background, worst upper end, {persistence}", upper, "<=",
                1.0, note=note),
            Bar(f"adas_increment over oi, worst field, {persistence}", to_oi, "<=", 1.25,
                note=note),
            beats("oi", ensemble),
            beats("letkf", ensemble),
        ]  # fmt: skip

    def pictured(self) -> tuple[Task, Case]:
        """Return the last case of ``persistence`` at the largest density."""
        task, _ = super().pictured()
        return task, self.source.cases(task.name)[-1]


STORE = "era5_ensemble.zarr"


class Era5EnsembleSource(EnsembleSample, CaseExperiment[Case]):
    """Problems from the shipped ERA5 ensemble sample, see `ensemble_sample.EnsembleSample`.

    Args:
        min_density: Smallest fraction of grid points observed in a training problem.
        max_density: Largest share; the draw is log-uniform between the two.
        augment: Roll longitudes, flip hemispheres, change the sign of the increment.
        seed: Seed of all random numbers.
    """

    forms = tuple(FORMS)
    decisive = ("seed",)
    attribution = ATTRIBUTION
    caption = "2 January 2017 12 UTC, member 9 is the truth"
    title = "geopotential at 500 hPa"
    notes: tuple[str, ...] = (
        "The ERA5 sample has two test times, which n counts. Intervals are over the nine members "
        "at these times: they speak of other members, not of other weather.",
    )

    def __init__(
        self,
        min_density: float = 0.01,
        max_density: float = 0.1,
        augment: bool = True,
        seed: int = 0,
    ) -> None:
        if not 0 < min_density <= max_density <= 1:
            raise ValueError(
                f"need 0 < min_density <= max_density <= 1, got {min_density} and {max_density}"
            )
        super().__init__(seed)
        self.min_density, self.max_density, self.augment = min_density, max_density, augment

    @property
    def headline(self) -> set[str]:
        """Metrics of tables: errors, and their ratios to those of the background."""
        return shown(self.channels, "rmse", "ratio")

    @property
    def observation_error(self) -> Tensor:
        """Standard deviation (C,) of the observation error: that of ``persistence``."""
        return self.error_sd["persistence"]

    def tasks(self, densities: Sequence[float] = DENSITIES) -> list[EnsembleTask]:
        """Return both kinds at every density."""
        return [EnsembleTask(kind, density) for kind in TASKS for density in densities]

    def methods(self, task: str) -> list[Method]:
        """Return the classical methods for a task."""
        return ensemble_methods(self, kind_of(task))

    def choices(self, densities: Sequence[float]) -> list[tuple[Task, Method]]:
        """Return every method on both kinds, at every density."""
        return [
            (EnsembleTask(kind, density), method)
            for kind in TASKS
            for method in ensemble_methods(self, kind)
            for density in densities
        ]

    def background_error(self, task: str) -> Tensor:
        """Return the standard deviations (C,) of the background error in the training period."""
        return self.task_background_sd[kind_of(task)]

    def store(self, folder: Path) -> Path:
        """Return where `make` writes the sample."""
        return folder / STORE

    def make(self, folder: Path, progress: Progress = silent) -> Iterator[Path]:  # noqa: ARG002
        """Write the sample as a WeatherBench-2 store."""
        states = self.fields.transpose(0, 1)  # (T,N,C,H,W)
        dataset = to_dataset(states, self.channels, self.grid, times=self.times)
        yield write_wb2(dataset, self.store(folder), overwrite=True)

    def prepare(self, progress: Progress = silent) -> None:
        """Nothing: the sample ships with the package."""

    def make_truth(self, progress: Progress = silent) -> None:
        """Nothing: the sample ships with the package."""

    def check(self) -> None:
        """Nothing: the sample ships with the package."""

    def data(self) -> list[Data]:
        """Return the shipped sample."""
        return sample_data()

    def training_objects(self) -> list[str]:
        """Return all members at the times of training."""
        return self.objects(TRAINING_TIMES)

    def test_objects(self) -> list[str]:
        """Return all members at the times of testing."""
        return self.objects(TEST_TIMES)

    def situation(self, task: Task, case: Case, members: int = 1) -> Situation:
        """Return a case for a single background or for the ensemble, whose mean is scored."""
        background = case.background[None] if members == 1 else case.ensemble
        observations = self.observe_case(kind_of(task.name), case, task.density)
        return Situation(background[None], GriddedObservations.stack([observations]), case.truth)

    def tuning_error(self, task: Task, errors: Tensor) -> float:
        """Return the error of the worst case, the mean over channels of RMSE over deviation."""
        return float((errors.sqrt() / self.background_error(task.name)).mean(1).max())

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
        chosen = slice(QUICK_CASES if quick else None)
        return EnsembleScores(self, self.tasks(densities), load, seeds, forms, settings, chosen)

    def setup(self) -> None:
        """Nothing: the sample is small and already loaded."""

    def problem(self, step: int, timeline: int, *, validation: bool = False) -> AssimilationBatch:
        """Return the training problem of a step and timeline; validation is not augmented."""
        draw = generator(self.seed, step, timeline, int(validation))
        task = TASKS[(step + timeline) % len(TASKS)]
        background, truth = self.pair(task, draw)
        low, high = math.log(self.min_density), math.log(self.max_density)
        density = math.exp(low + (high - low) * torch.rand((), generator=draw).item())
        if self.augment and not validation:
            background, truth = _augment(background, truth, draw)
        observations = self.observed(task, truth, density, draw)
        return AssimilationBatch(
            timeline=torch.tensor(timeline),
            reset=torch.tensor(True),
            background=background,
            truth=truth,
            observations=observations,
            background_sd=self.task_background_sd[task],
            model=torch.tensor(0),
        )


def _augment(background: Tensor, truth: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Roll, flip, change the sign of the increment: symmetries of the problem, not of weather."""
    roll, flip, sign = torch.randint(10**6, (3,), generator=draw).tolist()
    if sign % 2:
        truth = 2 * background - truth
    fields = torch.stack((background, truth)).roll(roll % background.shape[-1], -1)
    if flip % 2:
        fields = fields.flip(-2)
    return fields[0], fields[1]
