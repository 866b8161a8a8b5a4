"""Verification in observation space: background and analysis against the observations."""

from __future__ import annotations

import torch
from torch import Tensor

from weather.baselines.assimilator import Assimilator
from weather.cycle import CycleStep
from weather.grid import Grid
from weather.metrics import DepartureSums
from weather.observations.gridded import GriddedObservations
from weather.observations.network import bernoulli_network
from weather.training.batch import generator

WITHHELD_SHARE = 0.1


def withheld_points(grid: Grid, *keys: int) -> Tensor:
    """Return the grid points (H,W) whose observations verify an analysis made without them."""
    return bernoulli_network(grid, WITHHELD_SHARE, seed=generator(*keys).initial_seed())


class Departures:
    """Sums of departures from assimilated and from withheld observations.

    The withheld observations are missing in an extra analysis of the same background, never in the
    cycle itself: their errors are independent of that analysis.

    Args:
        points: (B,H,W) true at the points to withhold.
        every: Analyses between two extra ones.

    Attributes:
        assimilated: Departures from all observations, of the analysis that saw them.
        withheld: Departures from the withheld ones, of the extra analyses.
    """

    def __init__(self, points: Tensor, *, every: int = 1) -> None:
        self.points, self.every = points.unsqueeze(1), every
        self.assimilated: DepartureSums | None = None
        self.withheld: DepartureSums | None = None
        self._seen = 0

    def add(self, step: CycleStep, assimilator: Assimilator, keep: Tensor | None = None) -> None:
        """Add one analysis.

        Args:
            step: Background, analysis and observations.
            assimilator: What made the analysis.
            keep: (B,) timelines that count, all if None.
        """
        observations = step.observations
        if keep is not None:
            observations = observations.withhold(keep[:, None, None, None])
        background = step.background.mean(1)
        self.assimilated = _plus(self.assimilated, background, step.analysis.mean(1), observations)
        if self._seen % self.every == 0:
            analysis = assimilator.analyse(step.background, observations.withhold(~self.points))
            hidden = observations.withhold(self.points)
            self.withheld = _plus(self.withheld, background, analysis.mean(1), hidden)
        self._seen += 1


def _plus(
    sums: DepartureSums | None,
    background: Tensor,
    analysis: Tensor,
    observations: GriddedObservations,
) -> DepartureSums:
    found = DepartureSums.of(background, analysis, observations)
    return found if sums is None else sums.plus(found)


def figures(
    assimilated: DepartureSums | None, withheld: DepartureSums | None
) -> dict[str, list[float]]:
    """Return what is reported, by the stem of its name: a value for each channel, NaN for none.

    ``ob`` and ``oa`` are observation minus background and minus analysis; ``withheld_rmse`` is the
    root mean square of withheld observation minus analysis, which holds the observation error too.
    """
    found: dict[str, Tensor] = {}
    if assimilated is not None:
        found = {
            "ob_bias": assimilated.background_bias(),
            "ob_rms": assimilated.background_rms(),
            "oa_bias": assimilated.analysis_bias(),
            "oa_rms": assimilated.analysis_rms(),
        }
    if withheld is not None:
        found["withheld_rmse"] = withheld.analysis_rms()
    return {name: torch.as_tensor(values).tolist() for name, values in found.items()}
