"""Simulated networks and observations."""

import math

import numpy as np
import pytest
import torch

from weather.data.shipped import land_mask
from weather.grid import Grid, gaussian_grid, regular_grid
from weather.observations.gridded import grid_table
from weather.observations.simulated import (
    bernoulli_network,
    observe,
    simulate_table,
    station_network,
)
from weather.state import ERA5_SAMPLE

GRID = regular_grid(60, 120, poles=False)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("density", [0.0, 0.01, 0.1, 1.0])
def test_bernoulli_density(density):
    network = bernoulli_network(GRID, density, seed=3)
    assert network.shape == GRID.shape
    assert network.dtype == torch.bool
    deviation = math.sqrt(density * (1 - density) / network.numel())
    assert network.float().mean().item() == pytest.approx(density, abs=4 * deviation + 1e-12)


@pytest.mark.parametrize("density", [-0.1, 1.1, math.nan])
def test_impossible_densities_are_refused(density):
    with pytest.raises(ValueError, match="expected a fraction of the grid points from 0 to 1"):
        bernoulli_network(GRID, density, seed=0)


NETWORKS = {
    "bernoulli": lambda seed: bernoulli_network(GRID, 0.1, seed=seed),
    "stations": lambda seed: station_network(GRID, 200, seed=seed),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_depend_on_the_seed_alone(name):
    torch.manual_seed(0)
    first = NETWORKS[name](5)
    torch.manual_seed(1)
    assert torch.equal(first, NETWORKS[name](5))
    assert not torch.equal(first, NETWORKS[name](6))


def test_drawing_a_network_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    for make in NETWORKS.values():
        make(1)
    assert torch.equal(torch.rand(3), expected)


def test_stations_prefer_land_and_are_counted():
    network = station_network(GRID, 500, seed=0)
    assert network.sum() == 500
    land = land_mask(GRID)
    weights = GRID.area_weights()[:, None].expand(GRID.shape)
    density = [network[where].sum() / weights[where].sum() for where in (land, ~land)]
    assert 6 < density[0] / density[1] < 18


def test_stations_are_drawn_by_area():
    """Rows near the poles hold fewer stations than their fraction of the grid points."""
    counts = sum(station_network(GRID, 100, seed=seed).sum(1) for seed in range(40))
    polar, tropical = counts[:5].sum() + counts[-5:].sum(), counts[25:35].sum()
    assert polar < 0.6 * tropical


def test_all_points_may_be_stations():
    grid = gaussian_grid(4, 8)
    assert station_network(grid, 32, seed=0).all()
    with pytest.raises(ValueError, match="count is 33, expected 0 to 32, the points of the grid"):
        station_network(grid, 33, seed=0)


def test_observations_carry_noise_of_the_stated_size():
    truth = torch.randn(20, 2, *GRID.shape, generator=generator())
    network = bernoulli_network(GRID, 0.2, seed=0)
    errors = torch.tensor([10.0, 0.5])
    observations = observe(truth, network, errors, generator=generator(1))
    assert torch.equal(observations.mask, network.expand_as(truth))
    difference = (observations.values - truth)[..., network]
    for channel, sd in enumerate(errors.tolist()):
        sample = difference[:, channel]
        assert sample.std().item() == pytest.approx(sd, rel=0.03)
        assert abs(sample.mean().item()) < 4 * sd / math.sqrt(sample.numel())
        assert (observations.errors[:, channel][:, network] == sd).all()
    assert observations.values[..., ~network].abs().max() == 0


def test_noise_follows_the_generator():
    truth, network = torch.zeros(1, *GRID.shape), bernoulli_network(GRID, 0.5, seed=0)
    first, same, other = (
        observe(truth, network, torch.ones(1), generator=generator(seed)).values
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_each_channel_may_have_its_own_points_and_errors():
    truth = torch.zeros(3, 2, *GRID.shape)
    network = torch.stack([station_network(GRID, 10, seed=seed) for seed in range(2)])
    errors = torch.rand(truth.shape, generator=generator()) + 0.1
    observations = observe(truth, network, errors, generator=generator())
    assert torch.equal(observations.mask[2], network)
    assert torch.equal(observations.errors[1][network], errors[1][network])


@pytest.mark.parametrize("error", [0.0, -1.0])
def test_errors_must_be_positive(error):
    with pytest.raises(ValueError, match="expected a positive standard deviation"):
        observe(
            torch.zeros(1, *GRID.shape),
            bernoulli_network(GRID, 0.1, seed=0),
            torch.tensor([error]),
            generator=generator(),
        )


GAUSSIAN = gaussian_grid(16, 32)
TIME = np.datetime64("2017-01-01T12", "ns")
ERRORS = torch.tensor([50.0, 50.0, 0.7, 0.7])


def truth():
    noise = torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([800.0, 900.0, 8.0, 7.0])[:, None, None]
    return torch.tensor([14_000.0, 54_000.0, 280.0, 255.0])[:, None, None] + scale * noise


def simulate(count=300, seed=0, grid=GAUSSIAN, field=None):
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


@pytest.mark.parametrize(
    "grid", [GAUSSIAN, Grid(GAUSSIAN.latitude.flip(0), GAUSSIAN.longitude - 180)]
)
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
