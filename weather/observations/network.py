"""Simulated observing networks, and the noisy observations they make of a truth."""

import math

import torch
from torch import Tensor

from weather.data.coastline import land_mask
from weather.grid import EARTH_RADIUS_KM, Grid
from weather.observations.cells import cell_of
from weather.observations.gridded import GriddedObservations, per_channel
from weather.state import ChannelSpec

AIRCRAFT_VARIABLES = ("temperature", "u_component_of_wind", "v_component_of_wind")
SIX_HOURS_KM = 5000.0
LAND_PREFERENCE = 12.0  # stations per area over land against sea, about that of surface reports


def bernoulli_network(grid: Grid, density: float, *, seed: int) -> Tensor:
    """Observe every grid point independently with probability ``density``.

    Returns:
        Boolean (H, W).

    Raises:
        ValueError: If ``density`` lies outside [0, 1].
    """
    if not 0.0 <= density <= 1.0:
        raise ValueError(
            f"density is {density}, expected a fraction of the grid points from 0 to 1"
        )
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(grid.shape, generator=generator) < density


def station_network(grid: Grid, count: int, *, seed: int) -> Tensor:
    """Draw ``count`` different grid points by cell area, twelve times denser over land.

    Returns:
        Boolean (H, W) with exactly ``count`` true points.

    Raises:
        ValueError: If the grid has fewer than ``count`` points.
    """
    num_points = grid.shape[0] * grid.shape[1]
    if not 0 <= count <= num_points:
        raise ValueError(f"count is {count}, expected 0 to {num_points}, the points of the grid")
    chosen = _draw_without_replacement(_station_weight(grid).flatten(), count, seed)
    network = torch.zeros(num_points, dtype=torch.bool)
    network[chosen] = True
    return network.view(grid.shape)


def radiosonde_network(grid: Grid, channels: ChannelSpec, count: int, *, seed: int) -> Tensor:
    """Observe all upper-air variables at all levels above ``count`` land-biased stations.

    Returns:
        Boolean (C, H, W).

    Raises:
        ValueError: If there is no upper-air variable or not enough grid points.
    """
    _require_upper(channels)
    is_upper = torch.tensor([level is not None for _, level in channels])
    return is_upper[:, None, None] & station_network(grid, count, seed=seed)


def aircraft_network(grid: Grid, channels: ChannelSpec, count: int, *, seed: int) -> Tensor:
    """Observe wind and temperature at cruising level along the tracks of ``count`` aircraft.

    Each flies six hours of the great circle between two airports, which are drawn as stations
    are. Cruising levels are those from 200 to 300 hPa, or the topmost if there is none of them.

    Returns:
        Boolean (C, H, W).

    Raises:
        ValueError: If there is no upper-air variable or no aircraft.
    """
    _require_upper(channels)
    if count < 1:
        raise ValueError(f"count is {count}, expected at least one aircraft")
    generator = torch.Generator().manual_seed(seed)
    weight = _station_weight(grid).flatten()
    ends = torch.multinomial(weight, 2 * count, replacement=True, generator=generator)
    latitude = grid.latitude.repeat_interleave(grid.shape[1])[ends].view(2, count)
    longitude = grid.longitude.repeat(grid.shape[0])[ends].view(2, count)
    track = torch.zeros(grid.shape, dtype=torch.bool)
    track[cell_of(grid, *_flown(latitude, longitude, spacing=180.0 / grid.shape[0] / 4))] = True
    cruising = [level for level in channels.levels if 200 <= level <= 300] or [min(channels.levels)]
    reported = torch.tensor(
        [name in AIRCRAFT_VARIABLES and level in cruising for name, level in channels]
    )
    return reported[:, None, None] & track


def observe(
    truth: Tensor,
    network: Tensor,
    error_sd: Tensor,
    *,
    generator: torch.Generator | None = None,
    noise: bool = True,
) -> GriddedObservations:
    """Observe a truth through a network, with Gaussian errors of the stated standard deviation.

    Args:
        truth: (..., C, H, W) in physical units.
        network: Boolean, broadcastable to the truth: (H, W) observes all channels at the same
            points, (C, H, W) each channel at its own.
        error_sd: (C,) or broadcastable to the truth, positive.
        generator: Source of the noise; the global one by default.
        noise: False leaves the errors out of the values (the stated error stays), as in studies
            of ideal observations.

    Raises:
        ValueError: If an error is not positive.
    """
    errors = per_channel(error_sd).to(truth).expand_as(truth)
    values = truth
    if noise:
        drawn = torch.randn(truth.shape, generator=generator, dtype=truth.dtype)
        values = truth + errors * drawn.to(truth.device)
    return GriddedObservations.from_values(values, errors).withhold(network.to(truth.device))


def _station_weight(grid: Grid) -> Tensor:
    weight = grid.area_weights()[:, None].expand(grid.shape).clone()
    weight[land_mask(grid)] *= LAND_PREFERENCE
    return weight


def _require_upper(channels: ChannelSpec) -> None:
    if not channels.upper:
        raise ValueError(
            f"the state ({', '.join(channels.labels)}) has no upper-air variable to observe; "
            "draw stations instead"
        )


def _flown(latitude: Tensor, longitude: Tensor, *, spacing: float) -> tuple[Tensor, Tensor]:
    """Return positions every ``spacing`` degrees on great circles, for at most six hours.

    Args:
        latitude: (2, N) of start and destination, degrees.
        longitude: (2, N), degrees.
        spacing: Degrees of arc between positions.
    """
    phi, lam = latitude.deg2rad(), longitude.deg2rad()
    start, end = torch.stack((phi.cos() * lam.cos(), phi.cos() * lam.sin(), phi.sin()), -1)
    cosine = (start * end).sum(-1, keepdim=True).clamp(-1, 1)
    aside = torch.nn.functional.normalize(end - cosine * start, dim=-1)
    reach = math.degrees(SIX_HOURS_KM / EARTH_RADIUS_KM)
    arc = torch.arange(0.0, reach, spacing, dtype=phi.dtype).deg2rad()[:, None, None]
    arc = arc.minimum(cosine.acos())
    x, y, z = (arc.cos() * start + arc.sin() * aside).unbind(-1)
    return z.clamp(-1, 1).asin().rad2deg(), torch.atan2(y, x).rad2deg()


def _draw_without_replacement(weight: Tensor, count: int, seed: int) -> Tensor:
    """Indices of ``count`` draws by weight (Efraimidis and Spirakis 2006: the smallest E/w)."""
    generator = torch.Generator().manual_seed(seed)
    waiting = -torch.rand(weight.shape, generator=generator, dtype=torch.float64).log()
    return (waiting / weight).topk(count, largest=False).indices
