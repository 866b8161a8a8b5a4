"""Real spherical-harmonic transform on a Gaussian grid, for many fields at once.

States too: their scalars, vorticities and divergences.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from weather.grid import Grid, gaussian_grid, gaussian_nodes
from weather.state import ChannelSpec

EARTH_RADIUS_M = 6.37122e6
"""Radius of the sphere in Williamson et al. (1992), m."""


def legendre_functions(truncation: int, sines: Tensor) -> tuple[Tensor, Tensor]:
    """Return normalized associated Legendre functions and their derivatives.

    Args:
        truncation: T, the largest total wavenumber.
        sines: Sines of the latitudes (H,), float64.

    Returns:
        ``P`` (M, L, H) with mean square 1 over the sphere together with ``exp(i m lon)``, and
        ``(1 - sin(lat)**2) dP/dsin(lat)`` (M, L, H); both are zero for l < m.
    """
    size = truncation + 2  # the derivative of the last needs one more
    values = sines.new_zeros(size, size, len(sines))
    cosines = (1 - sines.square()).sqrt()
    values[0, 0] = 1.0
    for m in range(1, size):
        values[m, m] = math.sqrt((2 * m + 1) / (2 * m)) * cosines * values[m - 1, m - 1]
    order = torch.arange(size, dtype=sines.dtype)[:, None]
    degree = torch.arange(size + 1, dtype=sines.dtype)
    epsilon = ((degree**2 - order**2).clamp(min=0) / (4 * degree**2 - 1)).sqrt()[..., None]
    for n in range(1, size):
        below = values[:n, n - 2] * epsilon[:n, n - 1] if n > 1 else 0.0
        values[:n, n] = (sines * values[:n, n - 1] - below) / epsilon[:n, n]
    slopes = torch.zeros_like(values[:, :-1])
    column = degree[:-2, None]
    slopes -= column * epsilon[:, 1:-1] * values[:, 1:]
    slopes[:, 1:] += (column[1:] + 1) * epsilon[:, 1:-2] * values[:, :-2]
    return values[:-1, :-1].contiguous(), slopes[:-1].contiguous()


class SphericalTransform(nn.Module):
    """Transforms between a Gaussian grid and spherical harmonics, in float64.

    Args:
        truncation: T, the largest total wavenumber kept.
        num_latitudes: H, Gaussian latitudes, north to south. Products of two fields are free of
            aliasing if H >= (3 T + 1) / 2.
        num_longitudes: W, equidistant longitudes from 0 eastwards; likewise W >= 3 T + 1.
        radius: Radius of the sphere, m.

    Attributes:
        grid: The Gaussian grid.
        degree: Total wavenumber l (L,).
        laplacian: Eigenvalues -l (l + 1) / radius**2 of the Laplacian (L,), m-2.

    Raises:
        ValueError: The grid cannot represent the truncation.
    """

    degree: Tensor
    laplacian: Tensor
    _to_fourier: Tensor
    _from_fourier: Tensor
    _synthesis: Tensor
    _analysis: Tensor
    _wind_along: Tensor
    _wind_across: Tensor
    _flux_along: Tensor
    _flux_across: Tensor

    def __init__(
        self,
        truncation: int,
        num_latitudes: int,
        num_longitudes: int,
        *,
        radius: float = EARTH_RADIUS_M,
    ) -> None:
        super().__init__()
        if truncation < 1 or num_latitudes <= truncation or num_longitudes <= 2 * truncation:
            raise ValueError(
                f"truncation {truncation} needs more than {truncation} latitudes and more than "
                f"{2 * truncation} longitudes, got {num_latitudes} and {num_longitudes}"
            )
        self.truncation = truncation
        self.grid: Grid = gaussian_grid(num_latitudes, num_longitudes)
        tables = {
            **_longitude_tables(truncation, self.grid.longitude),
            **_latitude_tables(truncation, num_latitudes, radius),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.contiguous(), persistent=False)

    @property
    def size(self) -> int:
        """M = L = T + 1, the extent of both spectral dimensions."""
        return self.truncation + 1

    def pack_grid(self, field: Tensor) -> Tensor:
        """Turn ``(..., H, W)`` into float64 ``(W, H, K)``.

        Raises:
            ValueError: The field is not on the grid of this transform.
        """
        if tuple(field.shape[-2:]) != self.grid.shape:
            raise ValueError(
                f"expected (..., H, W) on {self.grid.shape}, found {tuple(field.shape)}"
            )
        fields = field.to(torch.float64).reshape(-1, *self.grid.shape)
        rows = fields.mT.reshape(
            len(fields), -1
        )  # two transpositions are faster than a permutation
        return rows.t().contiguous().view(*self.grid.shape[::-1], -1)

    def unpack_grid(self, packed: Tensor, shape: torch.Size) -> Tensor:
        """Undo `pack_grid` for the leading ``shape``."""
        return packed.permute(2, 1, 0).reshape(*shape, *self.grid.shape)

    def pack_coefficients(self, coefficients: Tensor) -> Tensor:
        """Turn complex ``(..., M, L)`` into float64 ``(2, M, L, K)``."""
        flat = coefficients.to(torch.complex128).reshape(-1, self.size, self.size)
        return torch.view_as_real(flat).permute(3, 1, 2, 0).contiguous()

    # Packed layout

    def fourier(self, grid: Tensor) -> Tensor:
        """Return the Fourier coefficients ``(2, M, H, K)`` of a grid field ``(W, H, K)``."""
        return (self._to_fourier @ grid.reshape(grid.shape[0], -1)).view(
            2, self.size, *grid.shape[1:]
        )

    def analysis(self, grid: Tensor) -> Tensor:
        """Return the coefficients ``(2, M, L, K)`` of a grid field ``(W, H, K)``."""
        return self.legendre_analysis(self.fourier(grid))

    def legendre_analysis(self, waves: Tensor) -> Tensor:
        """Return the coefficients ``(2, M, L, K)`` of Fourier coefficients ``(2, M, H, K)``."""
        return self._legendre(self._analysis, waves)

    def synthesis(self, spectral: Tensor) -> Tensor:
        """Return the grid field ``(W, H, K)`` of coefficients ``(2, M, L, K)``."""
        return self._to_grid(self._legendre(self._synthesis, spectral))

    def wind_synthesis(self, vorticity: Tensor, divergence: Tensor) -> tuple[Tensor, Tensor]:
        """Return (u, v), each ``(W, H, K)``, of vorticity and divergence ``(2, M, L, K)``."""
        u = self._legendre(self._wind_across, vorticity)
        _add_turned(u, self._wind_along, divergence)
        v = self._legendre(self._wind_across, divergence)
        _add_turned(v, self._wind_along, vorticity, keep=-1)
        return self._to_grid(u), self._to_grid(v)

    def gradient_synthesis(self, spectral: Tensor) -> tuple[Tensor, Tensor]:
        """Return the eastward and northward derivative ``(W, H, K)`` of ``(2, M, L, K)``, per m.

        The gradient of a scalar is the irrotational wind whose divergence is its Laplacian.
        """
        flow = spectral * self.laplacian[:, None]
        turned = torch.cat((flow[1:], flow[:1].neg()))  # times minus i
        x = self._legendre(self._wind_along, turned)
        return self._to_grid(x), self._to_grid(self._legendre(self._wind_across, flow.neg()))

    def divergence(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the divergence ``(2, M, L, K)`` of a vector field given as Fourier coefficients.

        Args:
            x: `fourier` of the eastward component (2, M, H, K).
            y: `fourier` of the northward component (2, M, H, K).
        """
        return _add_turned(
            self._legendre(self._flux_across, y), self._flux_along, x, keep=-1, sign=-1
        )

    def curl(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the vertical curl ``(2, M, L, K)`` of a vector field, as in `divergence`."""
        return _add_turned(self._legendre(self._flux_across, x), self._flux_along, y, sign=-1)

    def _to_grid(self, waves: Tensor) -> Tensor:
        return (self._from_fourier @ waves.reshape(2 * self.size, -1)).view(-1, *waves.shape[2:])

    @staticmethod
    def _legendre(table: Tensor, waves: Tensor) -> Tensor:
        """Return ``table @ waves`` for every order and part."""
        rows = waves.flatten(0, 1)
        return torch.bmm(table, rows).view(2, -1, table.shape[1], rows.shape[-1])


def _add_turned(
    result: Tensor, table: Tensor, waves: Tensor, *, keep: float = 1, sign: float = 1
) -> Tensor:
    """Make ``result`` in place ``keep * result - sign * i * table @ waves``; return it.

    Minus i times the waves are their imaginary part and minus their real part, which takes no copy.
    """
    half = table[: len(table) // 2]
    result[0].baddbmm_(half, waves[1], beta=keep, alpha=sign)
    result[1].baddbmm_(half, waves[0], beta=keep, alpha=-sign)
    return result


def _longitude_tables(truncation: int, longitude: Tensor) -> dict[str, Tensor]:
    order = torch.arange(truncation + 1, dtype=torch.float64)[:, None]
    angle_MW = order * longitude.deg2rad()
    waves = torch.cat((angle_MW.cos(), -angle_MW.sin()))  # (2 M, W)
    both_signs = torch.where(order > 0, 2.0, 1.0).double().repeat(2, 1)
    return {"_to_fourier": waves / len(longitude), "_from_fourier": (both_signs * waves).T}


def _latitude_tables(truncation: int, num_latitudes: int, radius: float) -> dict[str, Tensor]:
    sines, weights = gaussian_nodes(num_latitudes)
    cosines = (1 - sines.square()).sqrt()
    values, slopes = legendre_functions(truncation, sines)  # (M, L, H)
    degree = torch.arange(truncation + 1, dtype=torch.float64)
    order = degree[:, None, None]
    laplacian = -degree * (degree + 1) / radius**2
    wind = torch.where(degree > 0, -1 / laplacian, 0.0)[:, None] / (radius * cosines)
    flux = weights / 2 / (radius * cosines)
    # Each table serves the real and the imaginary part: (2 M, ...)
    return {
        "degree": degree,
        "laplacian": laplacian,
        "_synthesis": values.mT.repeat(2, 1, 1),
        "_analysis": (values * weights / 2).repeat(2, 1, 1),
        "_wind_along": (order * values * wind).mT.repeat(2, 1, 1),
        "_wind_across": (slopes * wind).mT.repeat(2, 1, 1),
        "_flux_along": (order * values * flux).repeat(2, 1, 1),
        "_flux_across": (slopes * flux).repeat(2, 1, 1),
    }


WIND_PAIRS = (
    ("u_component_of_wind", "v_component_of_wind"),
    ("10m_u_component_of_wind", "10m_v_component_of_wind"),
)


class FieldLayout(NamedTuple):
    """Channels that are scalars, and those of each wind, in the order of the channels.

    The F = C fields of a spectral state are the scalars, then the vorticities, then the
    divergences.
    """

    scalars: tuple[int, ...]
    eastward: tuple[int, ...]
    northward: tuple[int, ...]

    @classmethod
    def of(cls, channels: ChannelSpec) -> FieldLayout:
        """Return the layout of some channels.

        Raises:
            ValueError: A wind has one component only.
        """
        pairs: dict[int, int] = {}
        for u, v in WIND_PAIRS:
            levels = [level for name, level in channels if name == u]
            if levels != [level for name, level in channels if name == v]:
                raise ValueError(
                    f"{u} and {v} belong together, found the channels "
                    f"{', '.join(channels.labels)}: give both components or neither"
                )
            pairs |= {channels.index(u, level): channels.index(v, level) for level in levels}
        winds = {*pairs, *pairs.values()}
        scalars = (c for c in range(channels.num_channels) if c not in winds)
        return cls(tuple(scalars), tuple(pairs), tuple(pairs.values()))

    @property
    def vorticities(self) -> slice:
        """Fields that are vorticities."""
        return slice(len(self.scalars), len(self.scalars) + len(self.eastward))

    def restore(self, fields: Tensor, dim: int) -> Tensor:
        """Bring scalars, eastward and northward winds to the order of the channels."""
        order = torch.tensor([*self.scalars, *self.eastward, *self.northward]).argsort()
        return fields.index_select(dim, order)


def to_coefficients(states: Tensor, transform: SphericalTransform, layout: FieldLayout) -> Tensor:
    """Return the coefficients (2, M, L, F, K) of states (K, C, H, W), packed."""
    parts = []
    if layout.scalars:
        parts.append(transform.analysis(_packed(states, layout.scalars, transform)))
    if layout.eastward:
        x, y = (
            transform.fourier(_packed(states, wind, transform))
            for wind in (layout.eastward, layout.northward)
        )
        parts += [transform.curl(x, y), transform.divergence(x, y)]
    return torch.cat(parts, -1).unflatten(-1, (-1, len(states)))


def to_states(coefficients: Tensor, transform: SphericalTransform, layout: FieldLayout) -> Tensor:
    """Return the states (K, C, H, W), float64, of coefficients (2, M, L, F, K)."""
    sizes = (len(layout.scalars), len(layout.eastward), len(layout.eastward))
    scalars, vorticity, divergence = coefficients.split(sizes, dim=-2)
    parts = []
    if layout.scalars:
        parts.append(transform.synthesis(scalars.flatten(-2)))
    if layout.eastward:
        parts += transform.wind_synthesis(vorticity.flatten(-2), divergence.flatten(-2))
    fields = torch.cat(parts, -1).unflatten(-1, (-1, coefficients.shape[-1]))
    return layout.restore(fields, -2).permute(3, 2, 1, 0)


def _packed(states: Tensor, channels: tuple[int, ...], transform: SphericalTransform) -> Tensor:
    return transform.pack_grid(states[:, list(channels)].transpose(0, 1))
