"""Background-error covariances, of samples or modelled, in blocks: none exists as a whole."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from weather.grid import Grid, great_circle_km


class GridPoints:
    """The P = H W points of a grid as a list, row by row.

    Args:
        grid: The grid.
    """

    def __init__(self, grid: Grid) -> None:
        height, width = grid.shape
        self.count = height * width
        self.latitude = grid.latitude.repeat_interleave(width)
        self.longitude = grid.longitude.repeat(height)

    def distances(self, rows: Tensor, columns: Tensor | None = None) -> Tensor:
        """Return great-circle distances, km, float64.

        Args:
            rows: Indices (R,) of points.
            columns: Indices (K,) of points, all P points if None.

        Returns:
            (R, K), or (R, P).
        """
        keep = slice(None) if columns is None else columns
        return great_circle_km(
            self.latitude[rows, None],
            self.longitude[rows, None],
            self.latitude[keep],
            self.longitude[keep],
        )


def gaspari_cohn(ratio: Tensor) -> Tensor:
    """Return the compactly supported correlation of Gaspari and Cohn (1999), equation 4.10.

    Args:
        ratio: Distance over the half width c; the function vanishes from 2 on.
    """
    r = ratio.abs().clamp(max=2.0)
    inner = (((-r / 4 + 0.5) * r + 5 / 8) * r - 5 / 3) * r**2 + 1
    safe = r.clamp(min=1.0)
    outer = ((((r / 12 - 0.5) * r + 5 / 8) * r + 5 / 3) * r - 5) * r + 4 - 2 / (3 * safe)
    return torch.where(r < 1, inner, outer).clamp(min=0.0)


@dataclass(frozen=True)
class GaspariCohnTaper:
    """`gaspari_cohn` as a function of the distance in km.

    Args:
        half_width_km: c; an infinite one gives ones everywhere.
    """

    half_width_km: float

    def __call__(self, distance_km: Tensor) -> Tensor:
        """Return the taper of distances of any shape."""
        return gaspari_cohn(distance_km / self.half_width_km)


class DistanceWeights:
    """A function of the distance from observed points to all points, kept for fixed networks.

    Args:
        grid: The grid.
        weight: Function of distances in km, element by element.
        capacity_mib: Memory for kept weights, least recently used first out.
    """

    def __init__(
        self, grid: Grid, weight: Callable[[Tensor], Tensor], *, capacity_mib: float = 256.0
    ) -> None:
        self._points = GridPoints(grid)
        self._weight = weight
        self._capacity = int(capacity_mib * 2**20)
        self._kept: OrderedDict[tuple[bytes, torch.dtype], Tensor] = OrderedDict()

    def at(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the weights (R, P) between the points ``rows`` (R,) and all points."""
        key = (rows.numpy().tobytes(), dtype)
        if key not in self._kept:
            self._kept[key] = self._weight(self._points.distances(rows)).to(dtype)
            while (
                len(self._kept) > 1
                and sum(weights.nbytes for weights in self._kept.values()) > self._capacity
            ):
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]


TOLERANCE = 1e-6  # degrees
ROWS = 256  # points whose functions of distance are held at a time


def has_equal_steps(grid: Grid) -> bool:
    """Return whether the longitudes of a grid divide the circle into equal steps."""
    return bool((grid.longitude_bounds().diff() - 360.0 / grid.shape[1]).abs().max() < TOLERANCE)


class ZonalFunction:
    """A function of the distance between the points of a grid.

    Args:
        grid: Of equal longitude steps.
        function: Of distances in km, element by element.
        dtype: Of the table.

    Attributes:
        table: (H, H, W) value between a row, another, and a number of steps to the east.

    Raises:
        ValueError: The steps of the longitudes differ.
    """

    def __init__(
        self, grid: Grid, function: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32
    ) -> None:
        if not has_equal_steps(grid):
            raise ValueError(f"expected longitudes of equal steps around the globe, found {grid}")
        height, width = grid.shape
        east = torch.arange(width // 2 + 1, dtype=torch.float64) * (360.0 / width)
        rows, zero = grid.latitude, torch.zeros((), dtype=torch.float64)
        half = torch.stack(
            [function(great_circle_km(row, zero, rows[:, None], east)).to(dtype) for row in rows]
        )
        self.table = torch.cat((half, half[..., 1 : (width + 1) // 2].flip(-1)), -1)
        self.shape = (height, width)

    def transform(self) -> Tensor:
        """Return the Fourier transform (W // 2 + 1, H, H) in longitude, which is real."""
        return torch.fft.rfft(self.table.double(), dim=-1).real.permute(2, 0, 1).contiguous()

    def weighted(self, points: Tensor, *values: Tensor) -> list[Tensor]:
        """Return at every grid point the sum of values (..., R) at points times the function.

        Args:
            points: (R,) indices of points, row by row.
            values: Each (..., R).

        Returns:
            Of each, (..., P).
        """
        height, width = self.shape
        twice = torch.cat((self.table, self.table), -1)
        totals = [value.new_zeros(*value.shape[:-1], height * width) for value in values]
        for start in range(0, len(points), ROWS):
            part = slice(start, start + ROWS)
            near = torch.stack(
                [
                    twice[row, :, width - column : 2 * width - column]
                    for row, column in zip(
                        (points[part] // width).tolist(), (points[part] % width).tolist(),
                        strict=True,
                    )
                ]
            )  # fmt: skip
            for total, value in zip(totals, values, strict=True):
                total += value[..., part] @ near.flatten(1).to(value)
        return totals


class Covariance(Protocol):
    """A symmetric covariance B of states flattened to n = C H W values.

    Attributes:
        size: n.
        dtype: Type of the blocks.
    """

    size: int
    dtype: torch.dtype

    def block(self, rows: Tensor, columns: Tensor | None = None) -> Tensor:
        """Return the entries (R, K) of B at rows (R,) and columns (K,); (R, n) for all columns."""
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
        self.matrix, self.size = matrix, len(matrix)
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
        self._anomalies = (samples - samples.mean(0)).flatten(1) / math.sqrt(len(samples) - 1)
        self._points = GridPoints(grid)
        self._coupling = None if coupling is None else torch.as_tensor(coupling).to(samples)
        self.localization_km, self.size = localization_km, self._anomalies.shape[1]
        self.dtype = samples.dtype

    def block(self, rows: Tensor, columns: Tensor | None = None) -> Tensor:
        """Return the entries (R, K) of B at rows (R,) and columns (K,); (R, n) for all columns."""
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


class HomogeneousCovariance:
    """Standard deviations by latitude, one correlation of channels, Gaspari-Cohn in space.

    ``B[(c,i), (d,j)] = s[c,i] s[d,j] r[c,d] rho(distance(i,j) / length)``: the covariance of
    classical optimal interpolation (Gandin 1963), which a single pair of fields can estimate.

    Args:
        standard_deviation: (C,H,W) of the background error.
        channel_correlation: (C,C), symmetric, diagonal 1.
        grid: Grid of the fields.
        length_km: Half width of the correlation, which vanishes from twice of it on.

    Raises:
        ValueError: The shapes do not fit, the correlation is none, or the length is not positive.
    """

    dtype = torch.float32

    def __init__(
        self,
        standard_deviation: Tensor,
        channel_correlation: Tensor,
        grid: Grid,
        *,
        length_km: float,
    ) -> None:
        channels = channel_correlation.shape[-1]
        if tuple(standard_deviation.shape) != (channels, *grid.shape):
            raise ValueError(
                f"expected standard deviations {(channels, *grid.shape)}, found "
                f"{tuple(standard_deviation.shape)}"
            )
        transposed = channel_correlation.T
        ones = torch.ones_like(channel_correlation[:, 0])
        if (
            channel_correlation.shape != transposed.shape
            or not torch.allclose(channel_correlation, transposed, atol=1e-5)
            or not torch.allclose(channel_correlation.diagonal(), ones, atol=1e-5)
        ):
            raise ValueError(
                "the correlation of channels must be symmetric with ones on its diagonal, found "
                f"{channel_correlation.tolist()}"
            )
        if not length_km > 0:
            raise ValueError(f"length_km must be positive, got {length_km}")
        self._deviation = standard_deviation.flatten().to(self.dtype)
        self._correlation = channel_correlation.to(self.dtype)
        self._points = GridPoints(grid)
        self.grid, self.length_km = grid, length_km
        self.size = len(self._deviation)

    @classmethod
    def from_samples(cls, samples: Tensor, grid: Grid, *, length_km: float) -> Self:
        """Estimate deviations by latitude row and the correlation of channels.

        Args:
            samples: (K,C,H,W) background errors; their mean is taken for zero.
            grid: Grid of the fields.
            length_km: Half width of the correlation.
        """
        square = samples.square().mean((0, 3))  # (C,H)
        kernel = torch.ones(1, 1, 5, dtype=square.dtype) / 5
        padded = torch.nn.functional.pad(square[:, None], (2, 2), mode="replicate")
        by_row = torch.nn.functional.conv1d(padded, kernel)[:, 0].sqrt()
        scaled = (samples / by_row[:, :, None]) * grid.area_weights().to(samples)[:, None].sqrt()
        flat = scaled.transpose(0, 1).flatten(1)
        covariance = flat @ flat.T
        root = covariance.diagonal().sqrt()
        deviation = by_row[:, :, None].expand(-1, -1, grid.shape[1])
        return cls(deviation, covariance / root[:, None] / root, grid, length_km=length_km)

    @property
    def deviation(self) -> Tensor:
        """Standard deviation (C, H, W) of the background error."""
        return self._deviation.view(-1, *self.grid.shape)

    @property
    def channel_correlation(self) -> Tensor:
        """Correlation (C, C) of background errors between channels."""
        return self._correlation

    def with_length(self, length_km: float) -> Self:
        """Return the same covariance with another half width of the correlation."""
        return type(self)(self.deviation, self.channel_correlation, self.grid, length_km=length_km)

    def block(self, rows: Tensor, columns: Tensor | None = None) -> Tensor:
        """Return the entries (R, K) of B at rows (R,) and columns (K,); (R, n) for all columns."""
        count = self._points.count
        columns = torch.arange(self.size) if columns is None else columns
        here, row = (rows % count).unique(return_inverse=True)  # type: ignore[no-untyped-call]
        there, column = (columns % count).unique(return_inverse=True)  # type: ignore[no-untyped-call]
        distance = self._points.distances(here, there)
        taper = gaspari_cohn(distance / self.length_km).to(self.dtype)[row[:, None], column]
        taper *= self._correlation[(rows // count)[:, None], columns // count]
        return taper * self._deviation[rows, None] * self._deviation[columns]
