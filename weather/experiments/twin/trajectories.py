"""Training samples of a forecast model from the nature run of a twin world."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from core_gates.errors import GatesError
from weather.experiments.twin.world import Period, TwinWorld
from weather.progress import Progress, silent
from weather.training.stream import ForecastBatch, generator

SAMPLE, VALIDATION = 11, 12  # keys of random numbers


class NatureTrajectories:
    """Three successive states of a training member of a `TwinWorld`.

    The forecast model learns from the members that networks train on, and is validated on those of
    the validation period; it sees none of the tuning and test periods.

    Args:
        world: Holds the nature run.
        validation_leads: Steps that a validation forecast may take.
        seed: Seed of all random numbers.

    Raises:
        ValueError: The nature run is shorter than a validation forecast.
    """

    def __init__(self, world: TwinWorld, validation_leads: int = 4, seed: int = 0) -> None:
        if world.cycles < validation_leads:
            raise ValueError(
                f"validation forecasts of {validation_leads} steps do not fit into {world.cycles} "
                "cycles: take a longer nature run"
            )
        self.world, self.validation_leads, self.seed = world, validation_leads, seed
        self.channels, self.grid = world.channels, world.grid
        self.step_hours = world.hours

    def prepare(self, progress: Progress = silent) -> None:
        """Make the nature run where it is missing."""
        list(self.make(self.world.path.parent, progress))

    def make(self, folder: Path, progress: Progress = silent) -> Iterator[Path]:  # noqa: ARG002
        """Do the same, and yield its path."""
        yield self.world.make(progress)

    def check(self) -> None:
        """Refuse an existing nature run that is not that of the configuration.

        Raises:
            GatesError: It is damaged or belongs to another world.
        """
        if self.world.path.exists():
            self.world.prepare()

    def setup(self) -> None:
        """Load nature, and the units of the training period.

        Raises:
            GatesError: There is no nature run, or a channel never changes.
        """
        self.normalizer = self.world.normalizer()
        states = self.world.states("training")
        self.increment_sd = (
            self.grid.area_mean((states[1::4] - states[:-1:4]).square()).mean((0, 1)).sqrt()
        )
        still = (~(self.increment_sd > 0)).nonzero().flatten().tolist()
        if still:
            raise GatesError(
                f"channels {', '.join(self.channels.labels[i] for i in still)} never change: leave "
                "them out of the state"
            )

    def training_objects(self) -> list[str]:
        """Return one short hash for each trajectory of the training and validation periods."""
        return self.world.objects("training", "validation")

    def num_times(self, *, validation: bool = False) -> int:
        """Return the number of states of every trajectory of a period."""
        return len(self.world.states(_period(validation)))

    def state(self, member: int, time: int, *, validation: bool = False) -> Tensor:
        """Return one state (C, H, W), physical units."""
        return self.world.states(_period(validation))[time, member]

    def problem(self, step: int, timeline: int, *, validation: bool = False) -> ForecastBatch:
        """Return three successive states, a function of the arguments and the seed alone."""
        states = self.world.states(_period(validation))
        draw = generator(self.seed, VALIDATION if validation else SAMPLE, step, timeline)
        room = self.validation_leads if validation else 1
        member = int(torch.randint(states.shape[1], (), generator=draw))
        time = int(torch.randint(1, len(states) - room, (), generator=draw))
        numbers = (torch.tensor(value) for value in (step, timeline, member, time))
        return ForecastBatch(*numbers, *states[time - 1 : time + 2, member])


def _period(validation: bool) -> Period:
    return "validation" if validation else "training"
