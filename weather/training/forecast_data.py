"""Where a forecast model's training samples come from: three successive states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from weather.grid import Grid
from weather.progress import Progress, silent
from weather.state import ChannelSpec, Normalizer
from weather.training.stream import TimelineDataModule


class ForecastBatch(NamedTuple):
    """B samples, one for each row of the global batch.

    Attributes:
        step: (B,) number of the step.
        row: (B,) numbers of the rows, whatever rank holds them.
        member: (B,) number of the trajectory.
        time: (B,) index of the current state in it.
        previous: (B, C, H, W) the state one step before, physical units.
        current: (B, C, H, W).
        following: (B, C, H, W), to be forecast.
    """

    step: Tensor
    row: Tensor
    member: Tensor
    time: Tensor
    previous: Tensor
    current: Tensor
    following: Tensor


class TrajectorySource(Protocol):
    """Trajectories of states some hours apart.

    Attributes:
        step_hours: Hours between two states.
        increment_sd: (C,) standard deviation of the change of every channel in one step.
    """

    channels: ChannelSpec
    grid: Grid
    normalizer: Normalizer
    increment_sd: Tensor
    step_hours: float
    seed: int

    def prepare(self, progress: Progress = silent) -> None:
        """Make what is missing on disk; called on one process only."""

    def setup(self) -> None:
        """Load what :meth:`prepare` made."""

    def num_times(self, *, validation: bool = False) -> int:
        """Return the number of states of every trajectory of a period."""

    def state(self, member: int, time: int, *, validation: bool = False) -> Tensor:
        """Return one state (C, H, W), physical units."""

    def problem(self, step: int, timeline: int, *, validation: bool = False) -> ForecastBatch:
        """Return one sample without batch dimension, a function of its arguments alone."""


def stack_samples(samples: Sequence[ForecastBatch]) -> ForecastBatch:
    """Stack samples without batch dimension into one batch."""
    return ForecastBatch(*(torch.stack(column) for column in zip(*samples, strict=True)))


class ForecastDataModule(TimelineDataModule):
    """Training and validation samples for a forecast model.

    Args:
        source: Where the trajectories come from.
        steps: Optimizer steps of the whole run (one epoch).
        timelines: Rows of the global batch.
        validation_steps: Batches of one validation pass.
        validation_timelines: Rows of a validation batch over all ranks.
    """

    collate = staticmethod(stack_samples)

    def __init__(
        self,
        source: TrajectorySource,
        steps: int = 1000,
        timelines: int = 8,
        validation_steps: int = 4,
        validation_timelines: int = 4,
    ) -> None:
        super().__init__(source, steps, timelines, validation_steps, validation_timelines)
