"""The classical methods of a twin experiment, with the boxes in which they are tuned."""

from __future__ import annotations

import torch
from torch import Tensor

from weather.baselines.constant import Climatology, Persistence
from weather.baselines.covariance import DenseCovariance, SampleCovariance
from weather.baselines.free_run import FreeRun
from weather.baselines.inverse_distance import InverseDistance
from weather.baselines.letkf import LETKF
from weather.baselines.optimal_interpolation import OptimalInterpolation
from weather.experiments.method import Method, Setting
from weather.experiments.twin.world import Period, TwinWorld
from weather.training.batch import generator

MEMBERS = 20


class TwinMethods:
    """Build the methods of a world; the covariances of day differences are kept by their length.

    Args:
        world: The world that they work in.
    """

    def __init__(self, world: TwinWorld) -> None:
        self.world = world
        self._covariance: dict[float, DenseCovariance | SampleCovariance] = {}

    def all(self) -> list[Method]:
        """Return every classical method, the free run first."""
        grid, climatology = self.world.grid, self.world.climatology()
        return [
            Method("free_run", lambda _: FreeRun()),
            Method("persistence", lambda _: Persistence()),
            Method("climatology", lambda _: Climatology(climatology)),
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
            Method(
                "oi",
                self._optimal_interpolation,
                {"scale": (0.01, 0.4), "length_km": (1000.0, 4000.0)},
            ),
            Method(
                "letkf",
                self._letkf,
                {
                    "length_km": (500.0, 4000.0),
                    "excess": (0.005, 0.5),  # of the inflation over 1
                    "relaxation": (0.1, 0.95),
                },
                members=MEMBERS,
            ),
        ]

    def _optimal_interpolation(self, setting: Setting) -> OptimalInterpolation:
        length = setting["length_km"]
        covariance = self._covariance.get(length)
        if covariance is None:
            covariance = self.world.background_covariance(length)
            self._covariance = {length: covariance}  # only one, of 150 MB at T21
        return OptimalInterpolation(covariance, scale=setting["scale"])

    def _letkf(self, setting: Setting) -> LETKF:
        return LETKF(
            self.world.grid,
            MEMBERS,
            localization_km=setting["length_km"],
            inflation=1 + setting["excess"],
            relaxation=setting["relaxation"],
        )

    def first_background(self, period: Period, members: int) -> Tensor:
        """Return (B,M,C,H,W): the first background plus day differences of the training states.

        The perturbations of a timeline have mean zero; a single member is not perturbed.
        """
        first = self.world.first_background(period)
        if members == 1:
            return first
        samples = self.world.day_differences()
        rows = []
        for member in self.world.members[period]:
            draw = generator(self.world.seed, member, 5)
            chosen = samples[torch.randperm(len(samples), generator=draw)[:members]]
            rows.append(chosen - chosen.mean(0))
        return first + torch.stack(rows)
