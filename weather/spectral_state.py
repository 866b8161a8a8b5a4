"""A state as spherical harmonics of its scalars, vorticities and divergences."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from weather.spherical import SphericalTransform
from weather.state import ChannelSpec

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


def _split(fields: Tensor, layout: FieldLayout) -> tuple[Tensor, Tensor, Tensor]:
    count = len(layout.eastward)
    scalars, vorticity, divergence = fields.split((len(layout.scalars), count, count), dim=-2)
    return scalars, vorticity, divergence


def _packed(states: Tensor, channels: tuple[int, ...], transform: SphericalTransform) -> Tensor:
    return transform.pack_grid(states[:, list(channels)].transpose(0, 1))
