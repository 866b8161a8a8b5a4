"""From the sigma layers of the dry model to pressure levels, with geopotential."""

from collections.abc import Sequence

import torch
from torch import Tensor

from weather.models.earth import GAS_CONSTANT
from weather.models.held_suarez.sigma_levels import SigmaLevels
from weather.state import ChannelSpec

PRESSURE_LEVELS = (100, 200, 300, 500, 700, 850, 925, 1000)
"""hPa."""


def pressure_level_channels(levels: Sequence[int] = PRESSURE_LEVELS) -> ChannelSpec:
    """Return the channels of `to_pressure_levels`: four at the surface, four on the levels."""
    return ChannelSpec(
        surface=(
            "10m_u_component_of_wind",
            "10m_v_component_of_wind",
            "2m_temperature",
            "mean_sea_level_pressure",
        ),
        upper=("geopotential", "u_component_of_wind", "v_component_of_wind", "temperature"),
        levels=tuple(levels),
    )


def to_pressure_levels(state: Tensor, levels: Sequence[int] = PRESSURE_LEVELS) -> Tensor:
    """Interpolate states of `weather.models.held_suarez.model.HeldSuarez` to pressure levels.

    Temperature and wind are linear in ln p between the centers of layers and constant beyond the
    outermost; geopotential is the exact hydrostatic integral of that temperature, zero at the
    surface. The surface fields are those of the lowest layer, and the surface pressure, for the
    surface is flat and at sea level.

    Args:
        state: (..., 1 + 3 L, H, W): surface pressure (Pa), then temperature (K), eastward and
            northward wind (m/s) in L equidistant sigma layers from the top.
        levels: Pressures, hPa.

    Returns:
        (..., C, H, W) in the order of `pressure_level_channels`, in the dtype of the state.

    Raises:
        ValueError: The number of channels fits no number of layers, or a level is not positive.
    """
    channels = state.shape[-3]
    num_layers = (channels - 1) // 3
    if channels != 1 + 3 * num_layers or num_layers < 2:
        raise ValueError(f"expected 1 + 3 L channels with L >= 2, found {channels}")
    if not levels or min(levels) <= 0:
        raise ValueError(f"levels must be positive pressures in hPa, got {list(levels)}")
    sigma = SigmaLevels(num_layers).to(state.device)
    columns = state.to(torch.float64).movedim(-3, -1)  # (..., H, W, C)
    pressure, layers = columns[..., :1], columns[..., 1:]
    temperature, u, v = (layers[..., i * num_layers : (i + 1) * num_layers] for i in range(3))
    column = _Column(pressure.log() + sigma.centers.log(), levels)
    level_temperature = column.interpolate(temperature)
    geopotential = column.anchored(temperature @ sigma.hydrostatic)
    mean_temperature = (column.anchored(temperature) + level_temperature) / 2
    geopotential = geopotential + GAS_CONSTANT * mean_temperature * column.thickness
    surface = (u[..., -1:], v[..., -1:], temperature[..., -1:], pressure)
    upper = (geopotential, column.interpolate(u), column.interpolate(v), level_temperature)
    return torch.cat((*surface, *upper), dim=-1).movedim(-1, -3).to(state.dtype)


class _Column:
    """Where levels lie between the centers of layers, in ln p.

    Args:
        log_layers: ln p at the centers (..., L), from the top.
        levels: P pressures, hPa.

    Attributes:
        below: Layer under each level (..., P), clamped so that there is one above it.
        share: Distance to the layer above over that between the two, from 0 to 1.
        anchor: The layer from which geopotential is integrated: temperature is linear from there
            to the level, so its mean is that of the two ends.
        thickness: ln p of the anchor less ln p of the level.
    """

    def __init__(self, log_layers: Tensor, levels: Sequence[int]) -> None:
        log_levels = log_layers.new_tensor([100.0 * level for level in levels]).log()
        log_levels = log_levels.expand(*log_layers.shape[:-1], -1).contiguous()
        below = torch.searchsorted(log_layers.contiguous(), log_levels)
        self.below = below.clamp(1, log_layers.shape[-1] - 1)
        upper, lower = (log_layers.gather(-1, self.below - step) for step in (1, 0))
        self.share = ((log_levels - upper) / (lower - upper)).clamp(0, 1)
        self.anchor = self.below - (self.share == 0).long()
        self.thickness = log_layers.gather(-1, self.anchor) - log_levels

    def interpolate(self, field: Tensor) -> Tensor:
        """Return the field (..., L) at the levels (..., P)."""
        above, below = (field.gather(-1, self.below - step) for step in (1, 0))
        return torch.lerp(above, below, self.share)

    def anchored(self, field: Tensor) -> Tensor:
        """Return the field (..., L) at the anchors of the levels (..., P)."""
        return field.gather(-1, self.anchor)
