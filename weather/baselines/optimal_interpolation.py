"""Optimal interpolation with a given background-error covariance."""

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor

from weather.baselines.assimilator import check_shapes
from weather.baselines.covariance import Covariance
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
        self.covariance = covariance
        self.scale = scale
        self.members = members
        self._budget = int(cache_mib * 2**20)

    @property
    def covariance(self) -> Covariance:
        """Shape of B; a new one drops the factors of the old one."""
        return self._covariance

    @covariance.setter
    def covariance(self, covariance: Covariance) -> None:
        self._covariance = covariance
        self._factors.clear()

    def analyse(self, background: Tensor, observations: GriddedObservations) -> Tensor:
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
        while sum(map(_num_bytes, self._factors.values())) > self._budget:
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


def _num_bytes(factor: Factor) -> int:
    cross = 0 if factor.cross is None else factor.cross.nbytes
    return cross + factor.cholesky.nbytes + factor.indices.nbytes
