"""A state as spherical harmonics of its scalars, vorticities and divergences."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from weather.spherical import SphericalTransform, legendre_functions
from weather.state import ChannelSpec

WIND_PAIRS = (
    ("u_component_of_wind", "v_component_of_wind"),
    ("10m_u_component_of_wind", "10m_v_component_of_wind"),
)
NEAREST_POLE = 90.0 - 1e-6  # degrees; at a pole, a wind has no direction


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
    """Return the coefficients (2, M, L, F, K) of states (K, C, H, W), in the layout `spherical`."""
    parts = []
    if layout.scalars:
        parts.append(transform.analysis(_packed(states, layout.scalars, transform)))
    if layout.eastward:
        winds = (layout.eastward, layout.northward)
        x, y = (transform.fourier(_packed(states, wind, transform)) for wind in winds)
        parts += [transform.curl(x, y), transform.divergence(x, y)]
    return torch.cat(parts, -1).unflatten(-1, (-1, len(states)))


def to_states(coefficients: Tensor, transform: SphericalTransform, layout: FieldLayout) -> Tensor:
    """Return the states (K, C, H, W), float64, of coefficients (2, M, L, F, K)."""
    scalars, vorticity, divergence = _split(coefficients, layout)
    parts = []
    if layout.scalars:
        parts.append(transform.synthesis(scalars.flatten(-2)))
    if layout.eastward:
        parts += transform.wind_synthesis(vorticity.flatten(-2), divergence.flatten(-2))
    fields = torch.cat(parts, -1).unflatten(-1, (-1, coefficients.shape[-1]))
    return layout.restore(fields, -2).permute(3, 2, 1, 0)


class PointEvaluation:
    """The exact value of a spectral state at any place: no grid, no interpolation.

    Args:
        transform: The spherical transform.
        latitude: (p,) degrees; at a pole, that of a place 0.1 m away.
        longitude: (p,) degrees.
    """

    def __init__(self, transform: SphericalTransform, latitude: Tensor, longitude: Tensor) -> None:
        sines = latitude.double().clamp(-NEAREST_POLE, NEAREST_POLE).deg2rad().sin()
        self._values, slopes = legendre_functions(transform.truncation, sines)  # (M, L, p)
        order = torch.arange(transform.size, dtype=torch.float64)
        laplacian = transform.laplacian
        inverse = torch.where(laplacian < 0, 1 / laplacian, 0.0)[:, None]
        radius = (-2 / laplacian[1]).sqrt()
        wind = -inverse / (radius * (1 - sines.square()).sqrt())
        self._along, self._across = order[:, None, None] * self._values * wind, slopes * wind
        angle = order[:, None] * longitude.double().deg2rad()
        self._waves = torch.polar(
            torch.where(order > 0, 2.0, 1.0).double()[:, None].expand_as(angle), angle
        )

    def __call__(self, coefficients: Tensor, layout: FieldLayout) -> Tensor:
        """Return the values (K, C, p) of coefficients (2, M, L, F, K)."""
        complex_ = torch.complex(coefficients[0], coefficients[1])
        scalars, vorticity, divergence = _split(complex_, layout)
        u = self._sum(self._across, vorticity) + self._sum(self._along, -1j * divergence)
        v = -self._sum(self._across, divergence) + self._sum(self._along, -1j * vorticity)
        return layout.restore(torch.cat((self._sum(self._values, scalars), u, v), 1), 1)

    def _sum(self, table: Tensor, coefficients: Tensor) -> Tensor:
        """Return (K, F, p) of a table (M, L, p) and complex coefficients (M, L, F, K)."""
        waves = torch.einsum("mlp,mlfk->kfmp", table.to(coefficients.dtype), coefficients)
        return (waves * self._waves).sum(-2).real


def _split(fields: Tensor, layout: FieldLayout) -> tuple[Tensor, Tensor, Tensor]:
    count = len(layout.eastward)
    scalars, vorticity, divergence = fields.split((len(layout.scalars), count, count), dim=-2)
    return scalars, vorticity, divergence


def _packed(states: Tensor, channels: tuple[int, ...], transform: SphericalTransform) -> Tensor:
    return transform.pack_grid(states[:, list(channels)].transpose(0, 1))
