import pytest
import torch
from torch.testing import assert_close

from weather.baselines.covariance import SampleCovariance
from weather.baselines.ensemble_optimal_interpolation import EnsembleOptimalInterpolation
from weather.baselines.letkf import LETKF
from weather.baselines.optimal_interpolation import OptimalInterpolation
from weather.metrics import rmse


def test_each_timeline_uses_the_covariance_of_its_own_members(problem, grid):
    background, observations = problem(timelines=2, members=6)
    coupling = torch.eye(2)
    method = EnsembleOptimalInterpolation(
        grid, 6, localization_km=4000.0, scale=0.8, coupling=coupling
    )
    analysis = method.analyse(background, observations)
    for line, members in enumerate(background):
        covariance = SampleCovariance(members, grid, localization_km=4000.0, coupling=coupling)
        one = type(observations)(*(part[line, None] for part in observations))
        mean = OptimalInterpolation(covariance, scale=0.8).analyse(members.mean(0)[None, None], one)
        assert_close(analysis[line].mean(0), mean[0, 0], rtol=0, atol=1e-12)


def test_without_localization_the_mean_is_that_of_the_transform_filter(problem, grid):
    background, observations = problem(timelines=2, members=6)
    gain = EnsembleOptimalInterpolation(grid, 6).analyse(background, observations).mean(1)
    transform = LETKF(grid, 6).analyse(background, observations).mean(1)
    assert_close(gain, transform, rtol=0, atol=1e-10)


def test_without_observations_the_background_is_kept_exactly(problem, grid):
    background, observations = problem(members=3)
    nothing = observations.withhold(torch.tensor(False))
    method = EnsembleOptimalInterpolation(grid, 3)
    assert torch.equal(method.analyse(background, nothing), background)


def test_real_fields_come_closer_to_the_truth(era5_problem):
    grid, truth, background, observations = era5_problem
    method = EnsembleOptimalInterpolation(grid, 9, localization_km=500.0, coupling=torch.eye(4))
    analysis = method.analyse(background, observations)
    weights = grid.area_weights()
    before, after = (rmse(x[0].mean(0), truth, weights) for x in (background, analysis))
    assert (after < 0.97 * before).all()


def test_bad_arguments(problem, grid):
    with pytest.raises(ValueError, match="two members"):
        EnsembleOptimalInterpolation(grid, 1)
    with pytest.raises(ValueError, match="scale"):
        EnsembleOptimalInterpolation(grid, 3, scale=-1.0)
    background, observations = problem(members=3)
    with pytest.raises(ValueError, match="background \\(B, 4,"):
        EnsembleOptimalInterpolation(grid, 4).analyse(background, observations)
