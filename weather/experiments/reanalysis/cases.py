"""The held-out times of a store, their observations, and the classical methods."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from weather.baselines.assimilator import Assimilator
from weather.baselines.free_run import FreeRun
from weather.baselines.homogeneous import HomogeneousCovariance
from weather.baselines.inverse_distance import InverseDistance
from weather.baselines.variational.iterative import IterativeInterpolation
from weather.baselines.zonal import has_equal_steps
from weather.data.climatology import read_climatology
from weather.experiments.experiment import DENSITIES
from weather.experiments.method import Method, Setting
from weather.experiments.reanalysis.data import CLIMATOLOGY, ReanalysisData
from weather.observations.gridded import GriddedObservations
from weather.observations.network import bernoulli_network, observe
from weather.training.batch import generator

REFERENCE = "background"  # what all others are compared with
TUNING_CASES = 4
TOLERANCE = 1e-3  # of optimal interpolation: its errors are those of 1e-5 to four digits
PAIR_BYTES, MOST_PAIRS = 64 * 2**20, 64  # of background errors that covariances are estimated from
TABLE_BYTES = 2**30  # of the correlations between rows


class DensityTask(NamedTuple):
    """A density of observations on the held-out times."""

    density: float

    @property
    def name(self) -> str:
        """Name in settings and tables, such as ``0.1``."""
        return f"{self.density:.3g}"


class Case(NamedTuple):
    """A time to be scored: its position in the store, and that of its background."""

    truth: int
    background: int


class ReanalysisCases(ReanalysisData):
    """Tasks, cases and classical methods of a store."""

    max_cases: int

    def tasks(self, densities: Sequence[float] = DENSITIES) -> list[DensityTask]:
        """Return a task for every density."""
        return [DensityTask(density) for density in densities]

    def cases(self, *, tuning: bool = False) -> list[Case]:
        """Return held-out times, evenly spaced; for tuning, four times that validate."""
        truths, backgrounds = self.pairs("validation" if tuning else "held_out")
        count = min(len(truths), TUNING_CASES if tuning else self.max_cases)
        chosen = np.linspace(0, len(truths) - 1, count).round().astype(int)
        pairs = zip(truths[chosen].tolist(), backgrounds[chosen].tolist(), strict=True)
        return [Case(*pair) for pair in pairs]

    def observe_case(self, case: Case, density: float) -> GriddedObservations:
        """Return the observations (C,H,W) of a case: the same for every method."""
        draw = generator(20, case.truth, round(density * 1e6))
        seed = int(torch.randint(2**62, (), generator=draw))
        network = bernoulli_network(self.grid, density, seed=seed)
        return observe(self.truth[case.truth], network, self.observation_error, generator=draw)

    def climatology(self, case: Case) -> Tensor:
        """Return the climatology (C,H,W) of the time of a case."""
        return read_climatology(self.paths[CLIMATOLOGY], self.channels, self.times[case.truth])

    def methods(self, task: str) -> list[Method]:  # noqa: ARG002
        """Return the classical methods, the same for all tasks; the background comes first.

        Optimal interpolation needs longitudes of equal steps and a table of H H W numbers, and is
        left out where that exceeds a gigabyte.
        """
        grid = self.grid
        found = [
            Method(REFERENCE, lambda _: FreeRun()),
            Method(
                "inverse_distance",
                lambda s: InverseDistance(grid, power=s["power"], background_km=s["background_km"]),
                {"power": (1.0, 6.0), "background_km": (100.0, 5000.0)},
            ),
        ]
        if has_equal_steps(grid) and 8 * grid.shape[0] ** 2 * grid.shape[1] <= TABLE_BYTES:
            box = {"length_km": (300.0, 3000.0), "scale": (0.3, 3.0)}
            found.append(Method("oi", self._interpolation, box))
        return found

    def _interpolation(self, setting: Setting) -> Assimilator:
        covariance = self.covariance.with_length(setting["length_km"])
        return IterativeInterpolation(covariance, scale=setting["scale"], tolerance=TOLERANCE)

    @cached_property
    def covariance(self) -> HomogeneousCovariance:
        """Covariance of background errors of training times, evenly spaced."""
        truths, backgrounds = self.pairs("training")
        frame = 4 * self.channels.num_channels * self.grid.shape[0] * self.grid.shape[1]
        count = min(len(truths), MOST_PAIRS, max(2, PAIR_BYTES // frame))
        chosen = np.linspace(0, len(truths) - 1, count).round().astype(int)
        errors = torch.stack(
            [
                self.truth[int(truths[number])] - self.backgrounds[int(backgrounds[number])]
                for number in chosen
            ]
        )
        return HomogeneousCovariance.from_samples(errors, self.grid, length_km=1000.0)
