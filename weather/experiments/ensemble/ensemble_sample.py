"""Pairs of real ERA5 ensemble fields: backgrounds, truths, observations, and methods for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from harness.evidence import Row
from harness.files import short_digest
from weather.baselines.assimilator import FreeRun, InverseDistance
from weather.baselines.covariance import HomogeneousCovariance
from weather.baselines.letkf import LETKF
from weather.baselines.optimal_interpolation import OptimalInterpolation
from weather.data.shipped import load_era5_sample
from weather.experiments.experiment import Box, Method, Setting
from weather.observations.gridded import GriddedObservations
from weather.observations.simulated import drawn_network, observe
from weather.state import Normalizer
from weather.training.stream import generator

Task = Literal["persistence", "ensemble"]
TASKS: tuple[Task, ...] = ("persistence", "ensemble")
MEMBERS = range(1, 10)  # member 0 is the control, nearer to the mean than a truth may be
TRAINING_TIMES, TEST_TIMES = (0, 1), (2, 3)  # 1 January 00 and 12 UTC; 2 January 00 and 12 UTC
PERSISTENCE_ERRORS = {"geopotential": 50.0, "temperature": 0.7}  # m2 s-2 and K
PAIRS = 36  # pairs that the statistics of a task are estimated from


class Case(NamedTuple):
    """One problem to be scored.

    Attributes:
        member: The member that is the truth.
        time: Its time.
        background: (C,H,W).
        truth: (C,H,W).
        ensemble: (9,C,H,W) background ensemble: the other members.
    """

    member: int
    time: int
    background: Tensor
    truth: Tensor
    ensemble: Tensor


class EnsembleTask(NamedTuple):
    """A kind of background and a density of observations.

    Attributes:
        kind: Where the background comes from.
        density: Fraction of grid points observed.
    """

    kind: Task
    density: float

    @property
    def name(self) -> str:
        """Name in settings and tables, such as ``persistence/0.1``."""
        return f"{self.kind}/{self.density:.3g}"


def kind_of(task: str) -> Task:
    """Return the kind of a task by its name; ``persistence`` if it names none."""
    return next((kind for kind in TASKS if task.startswith(kind)), TASKS[0])


class EnsembleSample:
    """The shipped ERA5 ensemble sample: train on 1 January 2017, test on the 2nd.

    ``persistence``: the background is another member twelve hours earlier, so that its error is
    that of half a day of weather. ``ensemble``: the background is made of the other members at the
    same time, and its error is the uncertainty of the analysis itself.

    Training backgrounds of ``ensemble`` are single members or means of a random eight of the nine
    others: from the mean of all nine the truth would follow by arithmetic.

    Args:
        seed: Of all random numbers.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.fields, self.grid, self.channels, self.times = load_era5_sample()
        self.normalizer = Normalizer.fit(
            self.fields[:, TRAINING_TIMES], area_weights=self.grid.area_weights()
        )
        self.error_sd = {task: self._error_sd(task) for task in TASKS}
        self.task_background_sd = {
            task: self.grid.area_mean(self.errors(task).square()).mean(0).sqrt() for task in TASKS
        }
        self.background_sd = self.task_background_sd["persistence"]

    def _error_sd(self, task: Task) -> Tensor:
        """Observation error (C,): stated for ``persistence``, half the spread for ``ensemble``."""
        if task == "persistence":
            return torch.tensor([PERSISTENCE_ERRORS[name] for name, _ in self.channels])
        variance = self.fields[list(MEMBERS)][:, TRAINING_TIMES].var(0)
        return self.grid.area_mean(variance).mean(0).sqrt() / 2

    def errors(self, task: Task) -> Tensor:
        """Return samples (N,C,H,W) of the background error of the training period."""
        pairs = [self.pair(task, generator(self.seed, 9, number)) for number in range(PAIRS)]
        return torch.stack([truth - background for background, truth in pairs])

    def pair(self, task: Task, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw a background and its truth (C,H,W) of the training times."""
        order = torch.randperm(len(MEMBERS), generator=draw) + MEMBERS.start
        truth, others = int(order[0]), order[1:]
        if task == "persistence":
            start, end = TRAINING_TIMES
            return self.fields[others[0], start], self.fields[truth, end]
        time = TRAINING_TIMES[int(torch.randint(2, (), generator=draw))]
        others = torch.cat((others, torch.tensor([0])))[torch.randperm(9, generator=draw)]
        count = 8 if bool(torch.rand((), generator=draw) < 0.5) else 1
        return self.fields[others[:count], time].mean(0), self.fields[truth, time]

    def observed(
        self, task: Task, truth: Tensor, density: float, draw: torch.Generator
    ) -> GriddedObservations:
        """Return the noisy observations (C,H,W) of a random network."""
        return observe(
            truth, drawn_network(self.grid, density, draw), self.error_sd[task], generator=draw
        )

    def objects(self, times: Sequence[int]) -> list[str]:
        """Return short hashes of all members at some times of the sample."""
        names = [np.datetime_as_string(self.times[time], unit="h") for time in times]
        return [
            short_digest({"sample": "era5_ensemble", "time": str(name), "member": member})
            for name in names
            for member in range(len(self.fields))
        ]

    def cases(self, task: str = "", *, tuning: bool = False) -> list[Case]:
        """Return the test cases of a task or kind, every member but the control at both test times.

        For tuning: three members at the end of the training period.
        """
        kind = kind_of(task)
        if tuning:
            return [self._case(kind, member, TRAINING_TIMES[1]) for member in MEMBERS[::3]]
        return [self._case(kind, member, time) for time in TEST_TIMES for member in MEMBERS]

    def _case(self, task: Task, member: int, time: int) -> Case:
        others = [number for number in range(len(self.fields)) if number != member]
        truth = self.fields[member, time]
        if task == "ensemble":
            ensemble = self.fields[others, time]
            return Case(member, time, ensemble.mean(0), truth, ensemble)
        neighbor = MEMBERS[(member - MEMBERS.start + 1) % len(MEMBERS)]
        earlier = self.fields[:, time - 1]
        return Case(member, time, earlier[neighbor], truth, earlier[others])

    def observe_case(self, task: Task, case: Case, density: float) -> GriddedObservations:
        """Return the observations (C,H,W) of a case: the same for every method."""
        draw = generator(10, case.time, case.member, round(density * 1e6), TASKS.index(task))
        return self.observed(task, case.truth, density, draw)


LETKF_MEMBERS = 9
_LETKF_BOXES: dict[Task, Box] = {
    # Half a day of weather is some twenty times the spread of the analyses.
    "persistence": {"length_km": (300.0, 2000.0), "inflation": (1.0, 300.0)},
    "ensemble": {"length_km": (200.0, 1500.0), "inflation": (0.5, 4.0)},
}


def ensemble_methods(source: EnsembleSample, task: Task) -> list[Method]:
    """Return every classical method for a task; the background comes first."""
    grid, errors = source.grid, source.errors(task)
    variables = [name for name, _ in source.channels]
    same_variable = [[float(row == column) for column in variables] for row in variables]

    def optimal_interpolation(setting: Setting) -> OptimalInterpolation:
        covariance = HomogeneousCovariance.from_samples(
            errors, grid, length_km=setting["length_km"]
        )
        return OptimalInterpolation(covariance, scale=setting["scale"])

    def letkf(setting: Setting) -> LETKF:
        return LETKF(
            grid,
            LETKF_MEMBERS,
            localization_km=setting["length_km"],
            inflation=setting["inflation"],
            coupling=same_variable,
        )

    return [
        Method("background", lambda _: FreeRun()),
        Method(
            "inverse_distance",
            lambda s: InverseDistance(grid, power=s["power"], background_km=s["background_km"]),
            {"power": (1.0, 6.0), "background_km": (100.0, 5000.0)},
        ),
        Method(
            "inverse_distance_of_observations",
            lambda s: InverseDistance(grid, of="observations", power=s["power"]),
            {"power": (1.0, 6.0)},
        ),
        Method("oi", optimal_interpolation, {"length_km": (300.0, 3000.0), "scale": (0.3, 3.0)}),
        Method("letkf", letkf, _LETKF_BOXES[task], members=LETKF_MEMBERS),
    ]


def gates_by_time(
    task: str,
    cases: Sequence[Case],
    times: np.ndarray,
    errors: Mapping[str, Tensor],
    labels: Sequence[str],
) -> list[Row]:
    """Return gated over ungated errors at every time, and their range over members.

    The range is that over the members that are the truth, and no interval: members at one time are
    not independent.

    Args:
        task: Its name.
        cases: N cases.
        times: Those that cases number.
        errors: Square errors (N,C) by method.
        labels: Of the C channels.
    """
    if not {"adas_increment", "ungated"} <= errors.keys():
        return []
    rows = []
    for time in dict.fromkeys(case.time for case in cases):
        chosen = [case.time == time for case in cases]
        gated, other = (errors[form][chosen] for form in ("adas_increment", "ungated"))
        where = f"{task}/{np.datetime_as_string(times[time], unit='h')}"
        pooled, each = (gated.mean(0) / other.mean(0)).sqrt(), (gated / other).sqrt()
        for channel, label in enumerate(labels):
            figures = {
                "": pooled[channel],
                "_least_member": each[:, channel].min(),
                "_largest_member": each[:, channel].max(),
            }
            rows += [
                Row("adas_increment", where, f"over_ungated_{label}{name}", float(value),
                    n=len(gated))
                for name, value in figures.items()
            ]  # fmt: skip
    return rows
