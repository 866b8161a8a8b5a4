"""Optimal interpolation with a given covariance, and its correction by a network."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from weather.baselines.assimilator import Assimilator, check_shapes
from weather.baselines.covariance import (
    Covariance,
    GaspariCohnTaper,
    HomogeneousCovariance,
    ZonalFunction,
)
from weather.models.adas.analysis import Network
from weather.observations.gridded import GriddedObservations

_STREAM_ROWS = 1024  # observations whose covariances with the whole state are held at a time


class Factor(NamedTuple):
    """What an analysis needs of one observing network.

    Attributes:
        indices: (p,) observed elements of the flattened state.
        cholesky: (p, p) lower factor of ``H B H' + R``, float64.
        cross: (p, n) ``H B``, or None when it is too large to keep.
    """

    indices: Tensor
    cholesky: Tensor
    cross: Tensor | None


class OptimalInterpolation:
    """Optimal interpolation, ``x_a = x_b + B H' (H B H' + R)^-1 (y - H x_b)`` (Gandin 1963).

    The factor of a network is kept, so that a fixed network is factorised once; timelines may have
    different networks. Another ``covariance`` or ``scale`` has separate factors. Observation
    errors are independent, with a variance for each observation.

    Args:
        covariance: Shape of B, for example of differences of states 24 hours apart.
        scale: Factor on the background standard deviation: B = scale**2 times the covariance.
        members: Ensemble size; all members are moved by the same gain.
        cache_mib: Memory for the factors of networks, least recently used first out.

    Raises:
        ValueError: The scale is not positive.
    """

    def __init__(
        self,
        covariance: Covariance,
        *,
        scale: float = 1.0,
        members: int = 1,
        cache_mib: float = 1024.0,
    ) -> None:
        if not scale > 0:
            raise ValueError(f"scale must be positive, got {scale}")
        self._factors: OrderedDict[tuple[bytes, float], Factor] = OrderedDict()
        self.covariance, self.scale, self.members = covariance, scale, members
        self._budget = int(cache_mib * 2**20)

    @property
    def covariance(self) -> Covariance:
        """Shape of B; a new one drops the factors of the old one."""
        return self._covariance

    @covariance.setter
    def covariance(self, covariance: Covariance) -> None:
        self._covariance = covariance
        self._factors.clear()

    def analyze(self, background: Tensor, observations: GriddedObservations) -> Tensor:
        """Return the analysis; see `weather.baselines.assimilator.Assimilator`.

        Raises:
            ValueError: Shapes differ, or ``H B H' + R`` is not positive definite.
        """
        check_shapes(background, observations, self.covariance.size, self.members)
        state, values = background.flatten(2), observations.values.flatten(1)
        analysis = background.clone()
        for timeline, errors in enumerate(observations.errors.flatten(1)):
            factor = self._factor(errors)
            if len(factor.indices):
                increment = self._increment(factor, state[timeline], values[timeline])
                analysis[timeline] += increment.view_as(analysis[timeline]).to(analysis)
        return analysis

    def _factor(self, errors: Tensor) -> Factor:
        key = (errors.contiguous().numpy().tobytes(), self.scale)
        if key in self._factors:
            self._factors.move_to_end(key)
            return self._factors[key]
        factor = factorize(self.covariance, errors, self.scale, max_cross_bytes=self._budget // 2)
        self._factors[key] = factor
        while (
            sum(t.nbytes for held in self._factors.values() for t in held if t is not None)
            > self._budget
        ):
            self._factors.popitem(last=False)
        return factor

    def _increment(self, factor: Factor, state: Tensor, values: Tensor) -> Tensor:
        innovation = values[factor.indices].double() - state[:, factor.indices].double()
        weights = torch.cholesky_solve(innovation.T, factor.cholesky).T.to(self.covariance.dtype)
        if factor.cross is not None:
            return weights @ factor.cross
        total = weights.new_zeros(len(weights), self.covariance.size)
        for start in range(0, len(factor.indices), _STREAM_ROWS):
            part = slice(start, start + _STREAM_ROWS)
            total += weights[:, part] @ self.covariance.block(factor.indices[part])
        return total * self.scale**2


def factorize(
    covariance: Covariance, errors: Tensor, scale: float, *, max_cross_bytes: int
) -> Factor:
    """Factorise ``H B H' + R`` of one network.

    Args:
        covariance: Shape of B.
        errors: (n,) observation error standard deviations, infinite where absent.
        scale: B is scale**2 times the covariance.
        max_cross_bytes: ``H B`` is left out if it is larger.

    Raises:
        ValueError: The matrix is not positive definite.
    """
    indices = errors.isfinite().nonzero().flatten()
    cross = None
    if len(indices) * covariance.size * covariance.dtype.itemsize <= max_cross_bytes:
        cross = covariance.block(indices) * scale**2
        matrix = cross[:, indices].double()
    else:
        matrix = covariance.block(indices, indices).double() * scale**2
    matrix.diagonal().add_(errors[indices].double().square())
    cholesky, failure = torch.linalg.cholesky_ex(matrix)
    if failure:
        raise ValueError(
            f"H B H' + R of {len(indices)} observations is not positive definite, expected "
            "background errors that vary independently at the observed points: give more samples, "
            "a shorter localization or larger observation errors"
        )
    return Factor(indices, cholesky, cross)


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
        self._correlation = ZonalFunction(
            covariance.grid, GaspariCohnTaper(covariance.length_km), torch.float64
        ).transform()
        self._deviation = scale * covariance.deviation.double()  # (C,H,W)
        self._channels = covariance.channel_correlation.double()
        self.tolerance, self.max_iterations = tolerance, max_iterations
        self.members = members

    def analyze(self, background: Tensor, observations: GriddedObservations) -> Tensor:
        """Return the analysis; see `weather.baselines.assimilator.Assimilator`.

        Raises:
            ValueError: Shapes differ.
        """
        check_shapes(background, observations, math.prod(self._deviation.shape), self.members)
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
        pair = torch.bmm(self._correlation, torch.cat((waves.real, waves.imag), -1))
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


def corrected(background: Tensor, parts: Sequence[tuple[float, Tensor]]) -> Tensor:
    """Return the background plus fractions of increments.

    Args:
        background: (B,...).
        parts: Fractions, and the analyses (B,...) of whose increments they are.
    """
    moved = background
    for fraction, analysis in parts:
        moved = moved + fraction * (analysis - background)
    return moved


class DampedInterpolation:
    """Take a fraction of an increment, ``x_a = x_b + a (x_oi - x_b)``: a correction by no network.

    Args:
        interpolation: Any method with one member.
        alpha: The fraction.
    """

    members = 1

    def __init__(self, interpolation: Assimilator, alpha: float) -> None:
        self.interpolation, self.alpha = interpolation, alpha

    def analyze(self, background: Tensor, observations: GriddedObservations) -> Tensor:
        """Return the analysis (B,1,C,H,W)."""
        whole = self.interpolation.analyze(background, observations)
        return corrected(background, [(self.alpha, whole)])


class CorrectedInterpolation:
    """Add fractions of two increments, ``x_a = x_b + a (x_oi - x_b) + b (net(x_b, y) - x_b)``.

    With ``a = 1`` and ``b = 0`` it is interpolation to the last bit, with ``a = 0`` and ``b = 1``
    the network. A timeline that observes nothing keeps its background to the last bit.

    Args:
        network: Trained alone: its increment is not one on top of interpolation.
        interpolation: Any method with one member; None where ``alpha`` is 0.
        alpha: Fraction of the increment of the interpolation.
        beta: Fraction of the increment of the network.

    Raises:
        ValueError: A fraction is negative, or there is no interpolation.
    """

    members = 1

    def __init__(
        self,
        network: Network,
        interpolation: Assimilator | None = None,
        *,
        alpha: float = 0.0,
        beta: float = 1.0,
    ) -> None:
        if alpha < 0 or beta < 0:
            raise ValueError(f"alpha and beta must not be negative, got {alpha} and {beta}")
        if alpha and interpolation is None:
            raise ValueError(f"alpha is {alpha}, but there is no interpolation: give one, or 0")
        self.network, self.interpolation = network, interpolation
        self.alpha, self.beta = alpha, beta

    def analyze(self, background: Tensor, observations: GriddedObservations) -> Tensor:
        """Return the analysis (B,1,C,H,W); see `weather.baselines.assimilator.Assimilator`."""
        guess, guide = background, {}
        if self.interpolation is not None and (self.alpha or self.network.guided):
            guess = self.interpolation.analyze(background, observations)
            guide = {"interpolated": guess} if self.network.guided else {}
        if (self.alpha, self.beta) == (1.0, 0.0):
            return guess
        learned = self.network.analyze(background, observations, **guide)
        return corrected(background, [(self.beta, learned), (self.alpha, guess)])
