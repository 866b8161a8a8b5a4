"""Assimilation problems from pairs of real ERA5 ensemble fields."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from weather.experiments.ensemble.ensemble_sample import TASKS
from weather.experiments.ensemble.era5_ensemble import EnsembleExperiment
from weather.progress import Progress, silent
from weather.training.stream import AssimilationBatch, generator


class Era5EnsembleSource(EnsembleExperiment):
    """Problems from the shipped ERA5 ensemble sample, see `ensemble_sample.EnsembleSample`.

    Args:
        min_density: Smallest fraction of grid points observed in a training problem.
        max_density: Largest share; the draw is log-uniform between the two.
        augment: Roll longitudes, flip hemispheres, change the sign of the increment.
        seed: Seed of all random numbers.
    """

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

    def prepare(self, progress: Progress = silent) -> None:
        """Nothing: the sample ships with the package."""

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
