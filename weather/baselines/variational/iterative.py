"""Optimal interpolation for any number of observations: its equations solved by iteration."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from weather.baselines.assimilator import check_shapes
from weather.baselines.geometry import GaspariCohnTaper
from weather.baselines.homogeneous import HomogeneousCovariance
from weather.baselines.zonal import ZonalFunction
from weather.observations.gridded import GriddedObservations


class IterativeInterpolation:
    """Optimal interpolation in the space of the observations, by conjugate gradients.

    ``(R^-1/2 H B H' R^-1/2 + I) z = R^-1/2 (y - H x_b)`` and ``x_a = x_b + B H' R^-1/2 z`` (Da
    Silva et al. 1995). B is the covariance of classical optimal interpolation, of which nothing is
    held as a matrix: in longitude it is a convolution, done by Fourier transforms. The result is
    that of `weather.baselines.OptimalInterpolation` up to the tolerance, at a cost that hardly
    depends on the number of observations.

    Args:
        covariance: Shape of B, on a grid of equal longitude steps.
        scale: Factor on the background standard deviation.
        tolerance: Norm of the residual, over that of the right-hand side, at which it ends.
        max_iterations: Iterations after which it ends in any case.
        members: Ensemble size; all members are moved by the same gain.

    Raises:
        ValueError: A number is out of range, or the grid has other longitudes.
    """

    def __init__(
        self,
        covariance: HomogeneousCovariance,
        *,
        scale: float = 1.0,
        tolerance: float = 1e-4,
        max_iterations: int = 200,
        members: int = 1,
    ) -> None:
        if not scale > 0:
            raise ValueError(f"scale must be positive, got {scale}")
        if not 0 < tolerance < 1 or max_iterations < 1:
            raise ValueError(
                "need 0 < tolerance < 1 and max_iterations >= 1, got "
                f"{tolerance} and {max_iterations}"
            )
        taper = GaspariCohnTaper(covariance.length_km)
        self._correlation = ZonalFunction(covariance.grid, taper, torch.float64).transform()
        self._deviation = scale * covariance.deviation.double()  # (C,H,W)
        self._channels = covariance.channel_correlation.double()
        self.tolerance, self.max_iterations = tolerance, max_iterations
        self.members = members

    def analyse(self, background: Tensor, observations: GriddedObservations) -> Tensor:
        """Return the analysis; see `weather.baselines.assimilator.Assimilator`.

        Raises:
            ValueError: Shapes differ.
        """
        size = math.prod(self._deviation.shape)
        check_shapes(background, observations, size, self.members)
        analysis = background.clone()
        for timeline, errors in enumerate(observations.errors):
            weight = torch.where(errors.isfinite(), 1 / errors.double(), 0.0)  # (C,H,W)
            if not bool(weight.any()):
                continue
            for member, state in enumerate(background[timeline].double()):
                departure = weight * (observations.values[timeline].double() - state)
                increment = self.multiply(weight * self._solve(weight, departure))
                analysis[timeline, member] += increment.to(analysis)
        return analysis

    def multiply(self, fields: Tensor) -> Tensor:
        """Return B times fields (C,H,W), float64."""
        width = fields.shape[-1]
        waves = torch.fft.rfft(self._deviation * fields, dim=-1).permute(2, 1, 0)  # (K,H,C)
        pair = torch.cat((waves.real, waves.imag), -1)
        pair = torch.bmm(self._correlation, pair)
        real, imaginary = (pair @ _twice(self._channels)).chunk(2, -1)
        spread = torch.fft.irfft(torch.complex(real, imaginary).permute(2, 1, 0), width, dim=-1)
        return self._deviation * spread

    def _solve(self, weight: Tensor, right: Tensor) -> Tensor:
        """Return z by conjugate gradients; zero where nothing was observed."""
        solution = torch.zeros_like(right)
        residual, direction = right.clone(), right.clone()
        norm = residual.square().sum()
        enough = self.tolerance**2 * norm
        for _ in range(self.max_iterations):
            if not norm > enough:
                break
            image = direction + weight * self.multiply(weight * direction)
            step = norm / (direction * image).sum()
            solution += step * direction
            residual -= step * image
            before, norm = norm, residual.square().sum()
            direction = residual + (norm / before) * direction
        return solution


def _twice(matrix: Tensor) -> Tensor:
    """Return a matrix (C,C) as a block diagonal of two, for real and imaginary parts."""
    return torch.block_diag(matrix, matrix)  # type: ignore[no-untyped-call, no-any-return]
