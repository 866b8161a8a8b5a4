import pytest
import torch
from torch.testing import assert_close

from weather.baselines.letkf import LETKF
from weather.baselines.optimal_interpolation import OptimalInterpolation
from weather.baselines.variational.spectral import SpectralCovariance
from weather.baselines.variational.three_d_var import ThreeDVar
from weather.experiments.single_observation import single_observation_increment
from weather.spherical import SphericalTransform
from weather.state import SHALLOW_WATER

TRANSFORM = SphericalTransform(6, 10, 20)
CELL = (0, 3, 7)


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_optimal_interpolation_and_three_d_var_draw_the_column_of_b():
    sd = torch.tensor([20.0, 3.0, 3.0])
    b = SpectralCovariance.univariate(TRANSFORM, SHALLOW_WATER, sd, length_km=3000.0)
    background = draw(1, 3, 10, 20)
    column = b.block(torch.tensor([3 * 20 + 7]))[0].view(3, 10, 20)
    expected = column * 5.0 / (column[CELL] + 100.0)
    for method in (OptimalInterpolation(b), ThreeDVar(b)):
        found = single_observation_increment(method, background, CELL, innovation=5.0, error=10.0)
        assert_close(found[0], expected, rtol=1e-7, atol=1e-7)


def test_that_of_an_ensemble_is_its_own_covariance():
    background = draw(6, 3, 10, 20)
    method = LETKF(TRANSFORM.grid, 6)
    found = single_observation_increment(method, background, CELL, innovation=2.0, error=0.5)
    anomalies = background - background.mean(0)
    here = anomalies[:, CELL[0], CELL[1], CELL[2]]
    column = torch.einsum("m,mchw->chw", here, anomalies) / 5
    assert_close(found.mean(0), column * 2.0 / (column[CELL] + 0.25))


def test_a_cell_off_the_grid_is_refused():
    with pytest.raises(ValueError, match=r"the cell \(0, 10, 0\) lies outside of"):
        single_observation_increment(
            LETKF(TRANSFORM.grid, 6), draw(6, 3, 10, 20), (0, 10, 0), innovation=1.0, error=1.0
        )
