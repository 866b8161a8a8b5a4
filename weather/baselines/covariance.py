"""Background-error covariances, read in blocks so that none has to exist as a whole."""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from weather.baselines.geometry import GridPoints, gaspari_cohn
from weather.grid import Grid


class Covariance(Protocol):
    """A symmetric covariance B of states flattened to n = C H W values.

    Attributes:
        size: n.
        dtype: Type of the blocks.
    """

    size: int
    dtype: torch.dtype

    def block(self, rows: Tensor, columns: Tensor | None = None) -> Tensor:
        """Return B at some rows (R,) and columns (K,), or all columns if None."""
        ...


class DenseCovariance:
    """A covariance held as a matrix, for states of some thousand values.

    Args:
        matrix: (n, n), symmetric.

    Raises:
        ValueError: The matrix is not square.
    """

    def __init__(self, matrix: Tensor) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"expected a square matrix, found shape {tuple(matrix.shape)}")
        self.matrix = matrix
        self.size = len(matrix)
        self.dtype = matrix.dtype

    def block(self, rows: Tensor, columns: Tensor | None = None) -> Tensor:
        """Return (R, K), or (R, n) for all columns."""
        return self.matrix[rows] if columns is None else self.matrix[rows[:, None], columns]


class SampleCovariance:
    """Sample covariance of fields, localised by a Schur product with Gaspari-Cohn.

    ``B = A' A / (K - 1) * rho(d / c) * k`` with the centered samples A, the great-circle distance d
    and a factor k for each pair of channels. Only the samples (K, n) are stored.

    Args:
        samples: (K, C, H, W), for example differences of states 24 hours apart.
        grid: Grid of the fields.
        localization_km: Half width c of the taper, which vanishes from 2c on; infinite for none.
        coupling: (C, C) positive semidefinite factors between channels; the identity makes the
            channels independent of each other, None leaves their covariances as they are.

    Raises:
        ValueError: There are fewer than two samples, they are off the grid, or c is not positive.
    """

    def __init__(
        self,
        samples: Tensor,
        grid: Grid,
        *,
        localization_km: float = math.inf,
        coupling: Tensor | Sequence[Sequence[float]] | None = None,
    ) -> None:
        if samples.ndim != 4 or len(samples) < 2 or tuple(samples.shape[-2:]) != grid.shape:
            raise ValueError(
                f"expected at least two samples (K, C, H, W) on {grid.shape}, found shape "
                f"{tuple(samples.shape)}"
            )
        if not localization_km > 0:
            raise ValueError(f"localization_km must be positive, got {localization_km}")
        anomalies = samples - samples.mean(0)
        self._anomalies = anomalies.flatten(1) / math.sqrt(len(samples) - 1)
        self._points = GridPoints(grid)
        self._coupling = None if coupling is None else torch.as_tensor(coupling).to(samples)
        self.localization_km = localization_km
        self.size = self._anomalies.shape[1]
        self.dtype = samples.dtype

    def block(self, rows: Tensor, columns: Tensor | None = None) -> Tensor:
        """Return (R, K), or (R, n) for all columns."""
        right = self._anomalies if columns is None else self._anomalies[:, columns]
        covariance = self._anomalies[:, rows].T @ right
        columns = torch.arange(self.size) if columns is None else columns
        count = self._points.count
        if self._coupling is not None:
            covariance *= self._coupling[(rows // count)[:, None], columns // count]
        if not math.isinf(self.localization_km):
            points, row = torch.unique(rows % count, return_inverse=True)
            targets, column = torch.unique(columns % count, return_inverse=True)
            taper = gaspari_cohn(self._points.distances(points, targets) / self.localization_km)
            covariance *= taper.to(self.dtype)[row[:, None], column]
        return covariance

    def dense(self) -> DenseCovariance:
        """Return the same covariance as a matrix: faster to read for many different networks."""
        return DenseCovariance(self.block(torch.arange(self.size)))
