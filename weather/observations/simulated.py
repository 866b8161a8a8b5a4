"""Simulated observing networks, and the noisy observations and reports they make of a truth."""

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from weather.data.shipped import land_mask
from weather.grid import Grid
from weather.observations.gridded import GriddedObservations, cell_of, per_channel
from weather.observations.report_table import ObservationTable
from weather.state import ChannelSpec

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
    return torch.rand(grid.shape, generator=torch.Generator().manual_seed(seed)) < density


def drawn_network(grid: Grid, density: float, draw: torch.Generator) -> Tensor:
    """Return a `bernoulli_network` (H, W) whose seed is the next draw of a generator."""
    return bernoulli_network(grid, density, seed=int(torch.randint(2**62, (), generator=draw)))


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
    weight = grid.area_weights()[:, None].expand(grid.shape).clone()
    weight[land_mask(grid)] *= LAND_PREFERENCE
    chosen = _draw_without_replacement(weight.flatten(), count, seed)
    network = torch.zeros(num_points, dtype=torch.bool)
    network[chosen] = True
    return network.view(grid.shape)


def observe(
    truth: Tensor,
    network: Tensor,
    error_sd: Tensor,
    *,
    generator: torch.Generator | None = None,
) -> GriddedObservations:
    """Observe a truth through a network, with Gaussian errors of the stated standard deviation.

    Args:
        truth: (..., C, H, W) in physical units.
        network: Boolean, broadcastable to the truth: (H, W) observes all channels at the same
            points, (C, H, W) each channel at its own.
        error_sd: (C,) or broadcastable to the truth, positive.
        generator: Source of the noise; the global one by default.

    Raises:
        ValueError: If an error is not positive.
    """
    errors = per_channel(error_sd).to(truth).expand_as(truth)
    values = truth + errors * torch.randn(truth.shape, generator=generator, dtype=truth.dtype).to(
        truth.device
    )
    return GriddedObservations.from_values(values, errors).withhold(network.to(truth.device))


def _draw_without_replacement(weight: Tensor, count: int, seed: int) -> Tensor:
    """Indices of ``count`` draws by weight (Efraimidis and Spirakis 2006: the smallest E/w)."""
    waiting = -torch.rand(
        weight.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).log()
    return (waiting / weight).topk(count, largest=False).indices


def simulate_table(
    truth: Tensor,
    grid: Grid,
    channels: ChannelSpec,
    *,
    time: np.datetime64,
    count: int,
    error_sd: Tensor,
    seed: int,
    window_hours: float = 3.0,
) -> ObservationTable:
    """Let ``count`` land-biased stations report every channel once around an analysis time.

    A station lies anywhere inside its cell and reports the truth of the cell, not of its exact
    position, with a Gaussian error, at any time of the window; several may share a cell.
    Such reports fit an observation operator that takes the nearest cell exactly. Real ones do not:
    in ERA5 at 3 degrees, the nearest cell departs from the interpolated z500 by 149 m2 s-2 (root
    mean square), three times the error of a good report, which no score with these reports shows.

    Args:
        truth: (C, H, W) in physical units.
        grid: The H latitudes and W longitudes.
        channels: The C channels.
        time: Center of the window.
        count: Number of stations.
        error_sd: (C,) standard deviation of the errors.
        seed: Determines the stations, times and errors.
        window_hours: Half width of the window.
    """
    generator = torch.Generator().manual_seed(seed)
    occupied = station_network(grid, min(count, truth[0].numel()), seed=seed).nonzero()
    chosen = torch.randint(max(len(occupied), 1), (count - len(occupied),), generator=generator)
    row, column = torch.cat((occupied, occupied[chosen])).T
    latitude, longitude = _positions(grid, row, column, generator)
    row, column = cell_of(grid, latitude, longitude)
    offset = (2 * torch.rand(count, generator=generator, dtype=torch.float64) - 1) * window_hours
    seconds = (offset * 3600).long().numpy().astype("timedelta64[s]")
    noise = torch.randn(len(error_sd), count, generator=generator, dtype=torch.float64)
    values = truth[:, row, column].double() + error_sd.double()[:, None] * noise
    station = [f"S{number:05d}" for number in range(count)]
    reports = [
        pd.DataFrame(
            {
                "time": time.astype("datetime64[ns]") + seconds,
                "latitude": latitude.numpy(),
                "longitude": longitude.numpy(),
                "level_hpa": np.nan if level is None else float(level),
                "variable": name,
                "value": values[channel].numpy(),
                "error": error_sd[channel].item(),
                "station": station,
                "source": "simulated",
            }
        )
        for channel, (name, level) in enumerate(channels)
    ]
    return ObservationTable.from_frame(pd.concat(reports, ignore_index=True))


def _positions(
    grid: Grid, row: Tensor, column: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw a position inside each cell."""
    share = torch.rand(2, len(row), generator=generator, dtype=torch.float64)
    south, west = grid.latitude_bounds(), grid.longitude_bounds()
    latitude = south[row] + share[0] * (south[row + 1] - south[row])
    return latitude, (west[column] + share[1] * (west[column + 1] - west[column])) % 360.0
