import numpy as np
import pytest
import torch

from weather.grid import Grid, gaussian_grid
from weather.observations.gridded import grid_table
from weather.observations.simulated import simulate_table
from weather.state import ERA5_SAMPLE

GRID = gaussian_grid(16, 32)
TIME = np.datetime64("2017-01-01T12", "ns")
ERRORS = torch.tensor([50.0, 50.0, 0.7, 0.7])


def truth():
    noise = torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([800.0, 900.0, 8.0, 7.0])[:, None, None]
    return torch.tensor([14_000.0, 54_000.0, 280.0, 255.0])[:, None, None] + scale * noise


def simulate(count=300, seed=0, grid=GRID, field=None):
    field = truth() if field is None else field
    return simulate_table(
        field, grid, ERA5_SAMPLE, time=TIME, count=count, error_sd=ERRORS, seed=seed
    )


def test_every_station_reports_every_channel_within_the_window():
    frame = simulate().frame
    assert len(frame) == 4 * 300
    assert (frame.groupby("station").size() == 4).all()
    assert frame["station"].nunique() == 300
    offset = (frame["time"] - TIME).abs().max()
    assert np.timedelta64(150, "m") < offset <= np.timedelta64(180, "m")


@pytest.mark.parametrize("grid", [GRID, Grid(GRID.latitude.flip(0), GRID.longitude - 180)])
def test_gridded_reports_return_the_truth_within_their_errors(grid):
    gridded = grid_table(simulate(2000, grid=grid), grid, ERA5_SAMPLE, TIME)
    scaled = ((gridded.values - truth()) / gridded.errors)[gridded.mask]
    assert scaled.std().item() == pytest.approx(1, abs=0.07)
    assert scaled.mean().item() == pytest.approx(0, abs=0.1)
    assert gridded.errors[gridded.mask].min() < 0.5  # some cells hold several reports


def test_seed_decides():
    assert simulate(seed=1).frame.equals(simulate(seed=1).frame)
    assert not simulate(seed=1).frame["value"].equals(simulate(seed=2).frame["value"])


def test_no_stations():
    assert len(simulate(0)) == 0
