"""A background-error covariance that is diagonal in total wavenumber, with linear balance."""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor

from weather.baselines.minimizer import adjoint_increment
from weather.models.leapfrog import GRAVITY, ROTATION
from weather.spherical import (
    FieldLayout,
    SphericalTransform,
    to_coefficients,
    to_states,
)
from weather.state import ChannelSpec


class LinearBalance:
    """The height field in linear balance with a vorticity.

    It solves ``g laplacian(h) = div(f grad(psi))`` with the streamfunction psi: geostrophic balance
    on a sphere, without its singularity at the equator (Lorenz 1960; Parrish and Derber 1992).

    Args:
        transform: The spherical transform.
    """

    def __init__(self, transform: SphericalTransform) -> None:
        self.transform = transform
        laplacian = transform.laplacian[:, None]
        self._inverse = torch.where(laplacian < 0, 1 / laplacian, 0.0)
        self._coriolis = 2 * ROTATION * transform.grid.latitude.deg2rad().sin()[:, None]

    def height(self, vorticity: Tensor) -> Tensor:
        """Return the height (2, M, L, K), m, of a vorticity (2, M, L, K), s-1; its mean is zero."""
        transform = self.transform
        x, y = (
            transform.fourier(self._coriolis * wind)
            for wind in transform.gradient_synthesis(vorticity * self._inverse)
        )
        return transform.divergence(x, y) * self._inverse / GRAVITY


_ROWS = 256  # states whose transforms are held at a time


class SpectralCovariance:
    """Errors that are isotropic in scalars, vorticity and divergence, and optionally balanced.

    A control vector holds one number of unit variance for each real spherical harmonic of each
    control field. ``U`` multiplies those of total wavenumber l by the root of the covariance S_l
    between the fields, adds the balanced part of the height, and transforms to the grid: the
    spectral control variable of Parrish and Derber (1992). Both winds of a pair are one vorticity
    and one divergence. It serves 3D-Var as a control variable, and optimal interpolation as the
    same B.

    Args:
        transform: The spherical transform, on the grid of the states.
        channels: The C channels.
        spectra: S_l (L, F, F), symmetric: the covariance of the coefficients of the F = C control
            fields, scalars first, then vorticities, then divergences, in the order of the
            channels. The variance of a field is ``sum of (2 l + 1) S_l``.
        balance: (L,) part of the linearly balanced height that belongs to the vorticity, by total
            wavenumber; None for none. Needs the channels height and one wind.

    Raises:
        ValueError: The shapes do not fit, or there is nothing to balance.
    """

    dtype = torch.float64

    def __init__(
        self,
        transform: SphericalTransform,
        channels: ChannelSpec,
        spectra: Tensor,
        *,
        balance: Tensor | None = None,
    ) -> None:
        self.transform, self.channels, self.balance = transform, channels, balance
        self._layout = FieldLayout.of(channels)
        fields = channels.num_channels
        if tuple(spectra.shape) != (transform.size, fields, fields):
            raise ValueError(
                f"expected spectra {(transform.size, fields, fields)} for the channels "
                f"{', '.join(channels.labels)}, found {tuple(spectra.shape)}"
            )
        if balance is not None:
            _require_balanced(channels)
        self._linear = LinearBalance(transform)
        values, vectors = torch.linalg.eigh(spectra.double())
        self._roots = (vectors * values.clamp(min=0.0).sqrt()[:, None]) @ vectors.mT
        order = torch.arange(transform.size)[:, None]
        inside = order <= torch.arange(transform.size)
        self._held = torch.stack((inside, inside & (order > 0)))  # (2, M, L): no sine of order 0
        self._unit = torch.where(order > 0, 0.5, 1.0).double().sqrt()[:, :, None]
        self.num_controls = fields * int(self._held.sum())
        self.size = fields * math.prod(transform.grid.shape)

    @classmethod
    def from_samples(
        cls,
        samples: Tensor,
        transform: SphericalTransform,
        channels: ChannelSpec,
        *,
        balanced: bool = False,
    ) -> Self:
        """Estimate spectra, and the balanced part of the height, from samples of the error.

        Args:
            samples: (K, C, H, W) with mean zero, for example backgrounds minus truth.
            transform: The spherical transform, on the grid of the samples.
            channels: The C channels.
            balanced: Split the height into a balanced part, by regression on the linearly balanced
                height for each total wavenumber, and a rest that is independent of the wind.
        """
        layout = FieldLayout.of(channels)
        fields = to_coefficients(samples, transform, layout)  # (2, M, L, F, K)
        factors = None
        if balanced:
            _require_balanced(channels)
            balance = LinearBalance(transform).height(fields[..., layout.vorticities, :][..., 0, :])
            height = layout.scalars.index(channels.index("height"))
            shared = _by_degree(fields[..., height, :] * balance)
            power = _by_degree(balance.square())
            factors = torch.where(power > 0, shared / power, 0.0)
            fields[..., height, :] -= factors[:, None] * balance
        products = torch.einsum("pmlfk,pmlgk->pmlfg", fields, fields) / len(samples)
        products[:, 1:] *= 2  # both signs of the order
        return cls(
            transform,
            channels,
            products.sum((0, 1)) / (2 * transform.degree[:, None, None] + 1),
            balance=factors,
        )

    def increment(self, control: Tensor) -> Tensor:
        """Return ``U v`` (N, n) of control vectors (N, k), float64."""
        transform, layout = self.transform, self._layout
        count, fields = len(control), self.channels.num_channels
        spectral = control.new_zeros(*self._held.shape, fields, count, dtype=self.dtype)
        spectral[self._held] = control.to(self.dtype).T.reshape(-1, fields, count)
        spectral = self._roots @ (spectral * self._unit[..., None])
        if self.balance is not None:
            part = (
                self._linear.height(spectral[..., layout.vorticities, :][..., 0, :])
                * self.balance[:, None]
            )
            unit = torch.zeros(fields, 1, dtype=self.dtype)
            unit[layout.scalars.index(self.channels.index("height"))] = 1.0
            spectral = spectral + part[..., None, :] * unit
        return to_states(spectral, transform, layout).reshape(count, self.size)

    def block(self, rows: Tensor, columns: Tensor | None = None) -> Tensor:
        """Return the entries (R, K) of B at rows (R,) and columns (K,); (R, n) for all columns."""
        blocks = []
        for part in rows.split(_ROWS):
            units = torch.zeros(len(part), self.size, dtype=self.dtype)
            units[torch.arange(len(part)), part] = 1.0
            with torch.no_grad():
                lines = self.increment(adjoint_increment(self, units))
            blocks.append(lines if columns is None else lines[:, columns])
        return torch.cat(blocks) if blocks else torch.zeros(0, self.size, dtype=self.dtype)


def _require_balanced(channels: ChannelSpec) -> None:
    layout = FieldLayout.of(channels)
    if "height" not in channels.surface or len(layout.eastward) != 1:
        raise ValueError(
            "linear balance needs the channels height and one wind, found "
            f"{', '.join(channels.labels)}: leave it out"
        )


def _by_degree(products: Tensor) -> Tensor:
    """Sum (2, M, L, K) over everything but the degree, both signs of the order counted: (L,)."""
    sums = products.sum((0, 3))
    return sums[0] + 2 * sums[1:].sum(0)
