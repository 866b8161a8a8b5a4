"""A modelled background-error covariance, for when samples are too few."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from weather.baselines.geometry import GridPoints, gaspari_cohn
from weather.grid import Grid


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
        self.grid = grid
        self.length_km = length_km
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
        """(C,H,W) of the background error."""
        return self._deviation.view(-1, *self.grid.shape)

    @property
    def channel_correlation(self) -> Tensor:
        """(C,C)."""
        return self._correlation

    def with_length(self, length_km: float) -> Self:
        """Return the same covariance with another half width of the correlation."""
        return type(self)(self.deviation, self.channel_correlation, self.grid, length_km=length_km)

    def block(self, rows: Tensor, columns: Tensor | None = None) -> Tensor:
        """Return B at some rows (R,) and columns (K,), or all columns if None."""
        count = self._points.count
        columns = torch.arange(self.size) if columns is None else columns
        here, row = (rows % count).unique(return_inverse=True)  # type: ignore[no-untyped-call]
        there, column = (columns % count).unique(return_inverse=True)  # type: ignore[no-untyped-call]
        distance = self._points.distances(here, there)
        taper = gaspari_cohn(distance / self.length_km).to(self.dtype)[row[:, None], column]
        taper *= self._correlation[(rows // count)[:, None], columns // count]
        return taper * self._deviation[rows, None] * self._deviation[columns]
