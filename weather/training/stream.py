"""Samples of forecasts, and assimilation problems by step and timeline, on one rank or many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from core_gates.errors import GatesError
from harness.files import Data
from weather.grid import Grid
from weather.observations.gridded import GriddedObservations
from weather.progress import Progress, silent
from weather.state import ChannelSpec, Normalizer


class AssimilationBatch(NamedTuple):
    """B assimilation problems, one for each timeline.

    Attributes:
        timeline: (B,) global numbers of the timelines, whatever rank holds them.
        reset: (B,) True where ``background`` is to be used; elsewhere the background is the
            forecast from the timeline's last analysis.
        background: (B,C,H,W) recorded background.
        truth: (B,C,H,W) the state to be found.
        observations: values and errors (B,C,H,W).
        background_sd: (B,C) expected standard deviation of the background error.
        model: (B,) number of the forecast model that carries the timeline.
        later: (B,C,H,W) the truth of some hours later, None where no loss needs it.
    """

    timeline: Tensor
    reset: Tensor
    background: Tensor
    truth: Tensor
    observations: GriddedObservations
    background_sd: Tensor
    model: Tensor
    later: Tensor | None = None


def generator(*keys: int) -> torch.Generator:
    """Return a generator that depends on ``keys`` alone: a sample never depends on its neighbours.

    Every random draw of the data is a function of (seed, step, timeline), hence the same on one
    process and on many, and after a resume.
    """
    state = np.random.SeedSequence(keys).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def require_same_shape(
    arguments: Mapping[str, Any], grid_shape: tuple[int, int], channels: ChannelSpec
) -> None:
    """Refuse data of other channels or another grid than those of a network.

    Args:
        arguments: Of the network.
        grid_shape: Rows and columns of the data.
        channels: Channels of the data.

    Raises:
        GatesError: One of them differs; the message names the argument of the network.
    """
    expected = {
        "grid_shape": grid_shape,
        "num_surface": len(channels.surface),
        "num_upper": len(channels.upper),
        "num_levels": len(channels.levels),
    }
    for name, value in expected.items():
        given = arguments[name]
        if (tuple(given) if name == "grid_shape" else given) != value:
            raise GatesError(
                f"model.network.{name} is {given}, the data has {value}: set it to that"
            )


class ProblemSource(Protocol):
    """Where problems come from: a twin experiment, or pairs of reanalysis fields."""

    channels: ChannelSpec
    grid: Grid
    normalizer: Normalizer
    background_sd: Tensor
    seed: int

    def prepare(self, progress: Progress = silent) -> None:
        """Make what is missing on disk; called on one process only."""

    def setup(self) -> None:
        """Load what `prepare` made."""

    def problem(self, step: int, timeline: int, *, validation: bool = False) -> AssimilationBatch:
        """Return one problem without batch dimension, a function of its arguments alone."""


def stack(problems: Sequence[AssimilationBatch]) -> AssimilationBatch:
    """Stack problems without batch dimension into one batch."""
    observations = GriddedObservations.stack([p.observations for p in problems])
    columns = {
        name: torch.stack([getattr(p, name) for p in problems])
        for name in AssimilationBatch._fields
        if name != "observations" and getattr(problems[0], name) is not None
    }
    return AssimilationBatch(observations=observations, **columns)


class TimelineStream(IterableDataset[Any]):
    """Yield for every step the batch of the timelines that this rank owns.

    Args:
        source: Where the problems come from, by step and timeline.
        steps: Steps of the whole run; ``len`` says this even after a resume.
        timelines: Global numbers of the timelines of this rank.
        validation: Ask the source for its validation period.
        collate: Stacks problems to a batch.

    Attributes:
        position: The step that comes next in the pass that runs, or ran last.
        start: Where the next pass begins, set by a resume; every later pass begins at 0.
    """

    def __init__(
        self,
        source: Any,
        steps: int,
        timelines: Sequence[int],
        *,
        validation: bool = False,
        collate: Callable[[Sequence[Any]], Any] = stack,
    ) -> None:
        self.source, self.steps, self.timelines = source, steps, tuple(timelines)
        self.validation, self.collate = validation, collate
        self.position = self.start = 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        self.position, self.start = self.start, 0
        for step in range(self.position, self.steps):
            problems = [
                self.source.problem(step, k, validation=self.validation) for k in self.timelines
            ]
            self.position = step + 1
            yield self.collate(problems)


class TimelineLoader(DataLoader[Any]):
    """A loader that resumes at a step without drawing the steps before it."""

    def __init__(self, stream: TimelineStream) -> None:
        super().__init__(stream, batch_size=None)
        self.stream = stream

    def state_dict(self) -> dict[str, int]:
        """Return the step that comes next."""
        return {"position": self.stream.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at the step of ``state``."""
        self.stream.position = self.stream.start = state["position"] % self.stream.steps


class TimelineDataModule(L.LightningDataModule):
    """Training and validation samples by step and timeline, see `AssimilationDataModule`.

    Attributes:
        progress: Reports how far missing data have been made; silent at first.

    Raises:
        ValueError: A number is not positive.
    """

    collate: Callable[[Sequence[Any]], Any] = staticmethod(stack)

    def __init__(
        self,
        source: Any,
        steps: int,
        timelines: int,
        validation_steps: int,
        validation_timelines: int,
    ) -> None:
        super().__init__()
        for name, value in (
            ("steps", steps),
            ("timelines", timelines),
            ("validation_steps", validation_steps),
            ("validation_timelines", validation_timelines),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.source, self.steps, self.timelines = source, steps, timelines
        self.validation_steps, self.validation_timelines = validation_steps, validation_timelines
        self.progress: Progress = silent

    def training_objects(self) -> list[str]:
        """Return short hashes of what is trained on; none where the source does not list them."""
        objects: Callable[[], list[str]] = getattr(self.source, "training_objects", list)
        return objects()

    def digest(self) -> list[Data]:
        """Return hashes of the data that no setting determines, such as files of the user."""
        digest: Callable[[], list[Data]] = getattr(self.source, "digest", list)
        return digest()

    def prepare_data(self) -> None:
        """Let the source make what is missing on disk."""
        self.source.prepare(self.progress)

    def setup(self, stage: str) -> None:  # noqa: ARG002
        """Load the source."""
        self.source.setup()

    def _owned(self, timelines: int) -> range:
        world, rank = (
            (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        )
        if timelines % world:
            raise GatesError(
                f"{timelines} timelines cannot be split evenly among {world} processes; "
                f"choose a multiple of {world}"
            )
        return range(rank, timelines, world)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training samples of this rank."""
        stream = TimelineStream(
            self.source, self.steps, self._owned(self.timelines), collate=self.collate
        )
        return TimelineLoader(stream)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the validation samples of this rank."""
        owned, collate = self._owned(self.validation_timelines), self.collate
        stream = TimelineStream(
            self.source, self.validation_steps, owned, validation=True, collate=collate
        )
        return DataLoader(stream, batch_size=None)


class AssimilationDataModule(TimelineDataModule):
    """Training and validation problems for `weather.training.adas_module.AdasModule`.

    Args:
        source: Where the problems come from.
        steps: Optimizer steps of the whole run (one epoch).
        timelines: Timelines over all ranks, the global batch size.
        validation_steps: Cycles of one validation pass.
        validation_timelines: Timelines of the validation pass over all ranks.
    """

    def __init__(
        self,
        source: ProblemSource,
        steps: int = 1000,
        timelines: int = 16,
        validation_steps: int = 24,
        validation_timelines: int = 8,
    ) -> None:
        super().__init__(source, steps, timelines, validation_steps, validation_timelines)


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
        """Load what `prepare` made."""

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
