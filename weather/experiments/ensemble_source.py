"""Assimilation problems from pairs of real ERA5 ensemble fields."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from weather.data.batch import AssimilationBatch, generator
from weather.data.era5_sample import load_era5_sample
from weather.observations.network import bernoulli_network, observe
from weather.state import Normalizer

Task = Literal["persistence", "ensemble"]
MEMBERS = range(1, 10)  # member 0 is the control, nearer to the mean than a truth may be
TRAINING_TIMES, TEST_TIMES = (0, 1), (2, 3)  # 1 January 00 and 12 UTC; 2 January 00 and 12 UTC
PERSISTENCE_ERRORS = {"geopotential": 50.0, "temperature": 0.7}


class Case(NamedTuple):
    """One test problem: ``truth`` and ``background`` (C,H,W), the other members (M,C,H,W)."""

    member: int
    time: int
    background: Tensor
    truth: Tensor
    ensemble: Tensor


class Era5EnsembleSource:
    """Problems from the shipped ERA5 ensemble sample: train on 1 January 2017, test on the 2nd.

    ``persistence``: the background is another member twelve hours earlier, so that the error is
    that of half a day of weather. ``ensemble``: the background comes from the other members at
    the same time, and its error is the uncertainty of the analysis itself.

    Training backgrounds of ``ensemble`` are single members or means of a random eight of the
    nine others: from the mean of all nine the truth would follow by arithmetic.

    Args:
        task: ``"persistence"`` or ``"ensemble"``.
        min_density: Least share of grid points observed in a training problem.
        max_density: Largest share; the draw is log-uniform between the two.
        augment: Roll longitudes, flip hemispheres, turn the sign of the increment round.
        seed: Of all draws.
    """

    def __init__(
        self,
        task: Task = "persistence",
        min_density: float = 0.01,
        max_density: float = 0.1,
        augment: bool = True,
        seed: int = 0,
    ) -> None:
        if task not in ("persistence", "ensemble"):
            raise ValueError(f"task must be 'persistence' or 'ensemble', got {task!r}")
        if not 0 < min_density <= max_density <= 1:
            raise ValueError(
                f"need 0 < min_density <= max_density <= 1, got {min_density}, {max_density}"
            )
        self.task, self.augment, self.seed = task, augment, seed
        self.min_density, self.max_density = min_density, max_density
        self.fields, self.grid, self.channels, self.times = load_era5_sample()
        training = self.fields[:, TRAINING_TIMES]
        self.normalizer = Normalizer.fit(training, area_weights=self.grid.area_weights())
        self.error_sd = self._error_sd()
        errors = [self._pair(0, number, validation=True) for number in range(18)]
        square = torch.stack([(truth - background) ** 2 for background, truth in errors])
        self.background_sd = self.grid.area_mean(square).mean(0).sqrt()

    def prepare(self) -> None:
        """Nothing: the sample ships with the package."""

    def setup(self) -> None:
        """Nothing: the sample is small and already loaded."""

    def _error_sd(self) -> Tensor:
        """Observation error (C,): stated for ``persistence``, half the spread for ``ensemble``."""
        if self.task == "persistence":
            return torch.tensor([PERSISTENCE_ERRORS[name] for name, _ in self.channels])
        variance = self.fields[list(MEMBERS)][:, TRAINING_TIMES].var(0)
        return self.grid.area_mean(variance).mean(0).sqrt() / 2

    def problem(self, step: int, timeline: int, *, validation: bool = False) -> AssimilationBatch:
        """Return the training problem of a step and timeline; validation is not augmented."""
        background, truth = self._pair(step, timeline, validation=validation)
        draw = generator(self.seed, step, timeline, int(validation))
        low, high = math.log(self.min_density), math.log(self.max_density)
        density = math.exp(low + (high - low) * torch.rand((), generator=draw).item())
        network = bernoulli_network(
            self.grid, density, seed=int(torch.randint(2**62, (), generator=draw))
        )
        if self.augment and not validation:
            background, truth = _augment(background, truth, draw)
        observations = observe(truth, network, self.error_sd, generator=draw)
        return AssimilationBatch(
            torch.tensor(timeline),
            torch.tensor(True),
            background,
            truth,
            observations,
            torch.tensor(0),
        )

    def _pair(self, step: int, timeline: int, *, validation: bool) -> tuple[Tensor, Tensor]:
        draw = generator(self.seed, step, timeline, 2 + int(validation))
        order = torch.randperm(len(MEMBERS), generator=draw) + MEMBERS.start
        truth, others = int(order[0]), order[1:]
        if self.task == "persistence":
            start, end = TRAINING_TIMES
            return self.fields[others[0], start], self.fields[truth, end]
        time = TRAINING_TIMES[int(torch.randint(2, (), generator=draw))]
        others = torch.cat((others, torch.tensor([0])))[torch.randperm(9, generator=draw)]
        count = 8 if bool(torch.rand((), generator=draw) < 0.5) else 1
        return self.fields[others[:count], time].mean(0), self.fields[truth, time]

    def cases(self) -> list[Case]:
        """Return the test problems: every member but the control as truth, at both test times."""
        return [self._case(member, time) for time in TEST_TIMES for member in MEMBERS]

    def _case(self, member: int, time: int) -> Case:
        others = [number for number in range(len(self.fields)) if number != member]
        truth = self.fields[member, time]
        if self.task == "persistence":
            neighbor = MEMBERS[(member - MEMBERS.start + 1) % len(MEMBERS)]
            return Case(
                member, time, self.fields[neighbor, time - 1], truth, self.fields[others, time - 1]
            )
        ensemble = self.fields[others, time]
        return Case(member, time, ensemble.mean(0), truth, ensemble)

    def observe_case(self, case: Case, density: float, seed: int) -> AssimilationBatch:
        """Observe a test problem; all methods are given the same observations."""
        keys = (seed, case.time, case.member, round(density * 1e6))
        draw = generator(*keys)
        network = bernoulli_network(
            self.grid, density, seed=int(torch.randint(2**62, (), generator=draw))
        )
        observations = observe(case.truth, network, self.error_sd, generator=draw)
        return AssimilationBatch(
            torch.tensor(case.member),
            torch.tensor(True),
            case.background,
            case.truth,
            observations,
            torch.tensor(0),
        )


def _augment(background: Tensor, truth: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Roll, flip and turn the sign of the increment; a symmetry of the problem, not of weather."""
    roll, flip, sign = torch.randint(10**6, (3,), generator=draw).tolist()
    if sign % 2:
        truth = 2 * background - truth
    fields = torch.stack((background, truth)).roll(roll % background.shape[-1], -1)
    if flip % 2:
        fields = fields.flip(-2)
    return fields[0], fields[1]
