"""A twin experiment: nature is a model run, and observations are drawn from it with errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from core_gates.errors import GatesError
from harness.files import short_digest
from weather.baselines.covariance import DenseCovariance, SampleCovariance
from weather.cycle import Forecast
from weather.data.axes import to_tensor
from weather.data.store import naming, open_store
from weather.experiments.twin.nature import write_nature_run
from weather.models.leapfrog import LeapfrogModel
from weather.observations.gridded import GriddedObservations
from weather.observations.simulated import bernoulli_network, observe
from weather.progress import Progress, silent
from weather.state import ChannelSpec, Normalizer
from weather.training.stream import generator

Period = Literal["test", "tuning", "validation", "training", "choice"]
"""``choice`` is tuning and validation together."""

DENSE_SIZE = 8192  # largest state whose covariance is held as a matrix
LEAD = 4  # cycles between the first background and the truth that it was: 24 hours


class TwinWorld:
    """One nature run, whose members are dealt out to testing, tuning, validation and training.

    Members are independent trajectories of one model: no period shares a state with another.
    Every timeline starts from the truth of 24 hours before. Its observing network is fixed and
    observes all variables at the same points; networks, noise and states depend on seeds alone.

    Args:
        model: The model that nature follows, with ``grid`` and ``channels``.
        imperfect: The same model with an error, for forecasts.
        path: Zarr store of the nature run, made when missing.
        error_sd: Observation error standard deviations in the units of the state: one for each
            channel, or one for each variable by its name, for all of its levels.
        cycles: Cycles of a timeline.
        num_tests: Timelines for testing, one a seed.
        num_tuning: Timelines for tuning, each with its own network.
        num_validation: Timelines for validation.
        num_training: Timelines for training.
        spin_up_days: Days from the model's initial state that are thrown away.
        hours: Length of a cycle.
        seed: Seed of the world.
    """

    def __init__(
        self,
        model: LeapfrogModel,
        imperfect: LeapfrogModel,
        path: str,
        error_sd: tuple[float, ...] | dict[str, float] = (10.0, 1.0, 1.0),
        cycles: int = 420,
        num_tests: int = 3,
        num_tuning: int = 3,
        num_validation: int = 8,
        num_training: int = 16,
        spin_up_days: float = 100.0,
        hours: float = 6.0,
        seed: int = 0,
    ) -> None:
        self.model, self.imperfect, self.path = model, imperfect, Path(path)
        self.grid, self.channels = model.grid, model.channels
        self.error_sd = _error_sd(error_sd, self.channels)
        self.cycles, self.spin_up_days, self.hours, self.seed = cycles, spin_up_days, hours, seed
        counts = {
            "test": num_tests,
            "tuning": num_tuning,
            "validation": num_validation,
            "training": num_training,
        }
        self.members: dict[str, range] = {}
        first = 0
        for period, count in counts.items():
            least = 2 if period == "training" else 1  # one with each forecast model
            if count < least:
                raise GatesError(f"a world needs at least {least} {period} members, got {count}")
            self.members[period] = range(first, first + count)
            first += count
        self.members["choice"] = range(num_tests, num_tests + num_tuning + num_validation)
        self.num_members = first
        self._nature: Tensor | None = None

    @property
    def calls(self) -> int:
        """Calls of the model that make nature: a progress report each."""
        return math.ceil(self.spin_up_days * 24 / self.hours) + self.cycles + LEAD - 1

    def objects(self, *periods: Period) -> list[str]:
        """Return short hashes of the members of periods; those of another nature run differ."""
        nature = {
            "model": self.model.description,
            "members": self.num_members,
            "spin_up_days": float(self.spin_up_days),
            "seed": self.seed,
            "hours": float(self.hours),
        }
        members = [member for period in periods for member in self.members[period]]
        return [short_digest({**nature, "member": member}) for member in members]

    def prepare(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Run nature, or the rest of it if an earlier run was cut off."""
        write_nature_run(
            self.path,
            self.model,
            members=self.num_members,
            num_steps=self.cycles + LEAD,
            spin_up_days=self.spin_up_days,
            seed=self.seed,
            hours=self.hours,
            progress=progress,
        )

    def make(self, progress: Progress = silent, label: str = "nature run") -> Path:
        """Do the same with progress, and return the path of the store."""
        if not self.path.exists():
            with progress(label, self.calls) as tick:
                self.prepare(progress=lambda *_: tick())
        self.prepare()
        return self.path

    def forecast(self, name: str) -> Forecast:
        """Return the forecast model of a name, ``perfect`` or ``error``."""
        return self.model if name == "perfect" else self.imperfect

    @property
    def nature(self) -> Tensor:
        """Nature run (LEAD + cycles, members, C, H, W), float32.

        Raises:
            GatesError: There is no nature run, or it is damaged.
        """
        if self._nature is None:
            if not self.path.exists():
                raise GatesError(
                    f"no nature run at {self.path}: make it with `gates weather prepare`"
                )
            with naming(self.path), open_store(self.path) as dataset:
                try:
                    self._nature = to_tensor(dataset, self.channels)[: self.cycles + LEAD]
                except GatesError as error:
                    raise GatesError(
                        f"{error}, or delete it and run `gates weather prepare`"
                    ) from error
        return self._nature

    def states(self, period: Period) -> Tensor:
        """Return the states (T,B,C,H,W) of a period, the lead included."""
        members = self.members[period]
        return self.nature[:, members.start : members.stop]

    def truth(self, period: Period) -> Tensor:
        """Return the truth (cycles,B,C,H,W) at the times of the analyses."""
        return self.states(period)[LEAD:]

    def first_background(self, period: Period) -> Tensor:
        """Return the first backgrounds (B,1,C,H,W): the truth of 24 hours before."""
        return self.states(period)[0].unsqueeze(1)

    def networks(self, period: Period, density: float) -> Tensor:
        """Return the fixed networks (B,H,W) of a period at a density."""
        return torch.stack(
            [
                bernoulli_network(
                    self.grid, density, seed=generator(self.seed, member, 1).initial_seed()
                )
                for member in self.members[period]
            ]
        )

    def observations(self, period: Period, density: float) -> Iterator[GriddedObservations]:
        """Yield the observations (B,C,H,W) of every cycle, the same at each call.

        Args:
            period: Whose timelines.
            density: Fraction of the grid points that is observed.
        """
        fixed = self.networks(period, density)
        for cycle, truth in enumerate(self.truth(period)):
            rows = []
            for row, member in enumerate(self.members[period]):
                draw = generator(self.seed, member, 2, cycle)
                rows.append(observe(truth[row], fixed[row], self.error_sd, generator=draw))
            yield GriddedObservations.stack(rows)

    def normalizer(self) -> Normalizer:
        """Return mean and standard deviation of the training members."""
        return Normalizer.fit(self.states("training")[::8], area_weights=self.grid.area_weights())

    def climatology(self) -> Tensor:
        """Return the mean (C,H,W) of the training members."""
        return self.states("training").mean((0, 1))

    def climatological_sd(self) -> Tensor:
        """Return the standard deviation (C,) of training states about their climatology."""
        square = (self.states("training")[::8] - self.climatology()).square()
        return self.grid.area_mean(square).mean((0, 1)).sqrt()

    def day_differences(self) -> Tensor:
        """Return differences (N,C,H,W) of training states 24 hours apart, for covariances."""
        states = self.states("training")
        return (states[LEAD::LEAD] - states[:-LEAD:LEAD]).flatten(0, 1)

    def background_covariance(self, length_km: float) -> DenseCovariance | SampleCovariance:
        """Return the covariance of day differences, as a matrix where that is small enough."""
        covariance = SampleCovariance(self.day_differences(), self.grid, localization_km=length_km)
        return covariance.dense() if covariance.size <= DENSE_SIZE else covariance


def _error_sd(given: tuple[float, ...] | dict[str, float], channels: ChannelSpec) -> Tensor:
    """Return the standard deviations (C,)."""
    if isinstance(given, dict):
        names = (*channels.surface, *channels.upper)
        if set(given) != set(names):
            raise GatesError(
                f"error_sd names {', '.join(given)}, expected each of {', '.join(names)}"
            )
        given = tuple(given[name] for name, _ in channels)
    if len(given) != channels.num_channels:
        raise GatesError(
            f"error_sd has {len(given)} values, expected {channels.num_channels}, one each for "
            f"{', '.join(channels.labels)}"
        )
    if not all(value > 0 for value in given):
        raise GatesError(f"error_sd must be positive, got {given}")
    return torch.tensor(given)
