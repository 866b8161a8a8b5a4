from pathlib import Path

import numpy as np
import pytest
import torch

from weather.baselines.letkf import ensemble_weights
from weather.data.shipped import load_era5_sample
from weather.grid import Grid, gaussian_grid
from weather.observations.gridded import GriddedObservations
from weather.observations.simulated import bernoulli_network, observe

GOLDEN = Path(__file__).parents[2] / "golden" / "weather"


@pytest.fixture
def grid() -> Grid:
    return gaussian_grid(6, 12)


@pytest.fixture
def golden_filter():
    """Vectors of the textbook filters, with their 60 points as a 6 x 10 grid."""
    with np.load(GOLDEN / "da_oi_etkf_letkf_a.npz") as file:
        vectors = {name: torch.from_numpy(file[name]) for name in file}
    grid = Grid(vectors["lat_rad"][::10].rad2deg(), vectors["lon_rad"][:10].rad2deg())
    values = torch.zeros(60, dtype=torch.float64)
    errors = torch.full((60,), torch.inf, dtype=torch.float64)
    values[vectors["obs_index"]] = vectors["y"]
    errors[vectors["obs_index"]] = vectors["R_diag"].sqrt()
    shape = (1, 1, 6, 10)
    return vectors, grid, GriddedObservations(values.view(shape), errors.view(shape))


@pytest.fixture
def etkf():
    """The global filter (Bishop et al. 2001): states (M, n), seen as (M, p), values and errors."""

    def analyze(states, observed, values, errors, *, inflation=1.0):
        mean, seen = states.mean(0), observed.mean(0)
        scaled = (observed - seen) / errors
        innovation = torch.where(errors.isfinite(), (values - seen) / errors, 0.0)
        weights = ensemble_weights(scaled @ scaled.T, scaled @ innovation, inflation)
        moved, anomalies = weights.update(mean, (states - mean).T)
        return (moved[:, None] + anomalies).T

    return analyze


@pytest.fixture
def problem(grid):
    """Return a function: B backgrounds of M members with C channels, and noisy observations."""

    def make(timelines=2, members=1, channels=2, *, density=0.3, error=0.5, seed=0):
        generator = torch.Generator().manual_seed(seed)
        shape = (timelines, members, channels, *grid.shape)
        background = torch.randn(shape, generator=generator, dtype=torch.float64)
        truth = torch.randn(
            (timelines, channels, *grid.shape), generator=generator, dtype=torch.float64
        )
        network = torch.rand(truth.shape, generator=generator) < density
        observations = observe(truth, network, torch.full((channels,), error), generator=generator)
        return background, observations

    return make


@pytest.fixture(scope="session")
def era5_problem():
    """One member of ERA5 as truth, the nine others as background, a tenth of the points seen."""
    sample = load_era5_sample()
    fields = sample.fields[:, 3]
    truth, others = fields[4], torch.cat((fields[:4], fields[5:]))
    error = others.var(0).mean((-2, -1)).sqrt() / 2
    network = bernoulli_network(sample.grid, 0.1, seed=0)
    observations = observe(truth[None], network, error, generator=torch.Generator().manual_seed(0))
    return sample.grid, truth, others[None], observations
