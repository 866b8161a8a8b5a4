"""Optimal interpolation with the covariance of the background ensemble."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from weather.baselines.assimilator import check_shapes
from weather.baselines.covariance import SampleCovariance
from weather.baselines.optimal_interpolation import OptimalInterpolation
from weather.grid import Grid
from weather.observations.gridded import GriddedObservations


class EnsembleOptimalInterpolation:
    """Optimal interpolation whose covariance is that of the background ensemble.

    All members are moved by the same gain with the same observations, so that the mean is the
    optimal interpolation of the mean; their spread is narrower than the analysis error, because
    the observations are not perturbed (Evensen 1994 against Burgers et al. 1998).

    Args:
        grid: Grid of the fields.
        members: Ensemble size M, at least 2.
        localization_km: Half width c of the Gaspari-Cohn taper.
        scale: Factor on the ensemble standard deviation.
        coupling: (C, C) positive semidefinite factors on the covariances between channels.

    Raises:
        ValueError: The ensemble is too small, or the scale is not positive.
    """

    def __init__(
        self,
        grid: Grid,
        members: int,
        *,
        localization_km: float = math.inf,
        scale: float = 1.0,
        coupling: Tensor | Sequence[Sequence[float]] | None = None,
    ) -> None:
        if members < 2:
            raise ValueError(f"an ensemble covariance needs at least two members, got {members}")
        if not scale > 0:
            raise ValueError(f"scale must be positive, got {scale}")
        self.grid = grid
        self.members = members
        self.localization_km = localization_km
        self.scale = scale
        self.coupling = coupling

    def analyse(self, background: Tensor, observations: GriddedObservations) -> Tensor:
        """Return the analysis; see `weather.baselines.assimilator.Assimilator`.

        Raises:
            ValueError: Shapes differ, or ``H B H' + R`` is not positive definite.
        """
        check_shapes(background, observations, math.prod(background.shape[2:]), self.members)
        analyses = []
        for timeline, ensemble in enumerate(background):
            covariance = SampleCovariance(
                ensemble,
                self.grid,
                localization_km=self.localization_km,
                coupling=self.coupling,
            )
            method = OptimalInterpolation(covariance, scale=self.scale, members=self.members)
            one = GriddedObservations(*(part[timeline, None] for part in observations))
            analyses.append(method.analyse(ensemble[None], one))
        return torch.cat(analyses)
