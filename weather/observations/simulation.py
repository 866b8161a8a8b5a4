"""Simulated reports: a table of observations made of a truth, cell by cell."""

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from weather.grid import Grid
from weather.observations.cells import cell_of
from weather.observations.network import station_network
from weather.observations.table import ObservationTable
from weather.state import ChannelSpec


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
    longitude = west[column] + share[1] * (west[column + 1] - west[column])
    return latitude, longitude % 360.0
