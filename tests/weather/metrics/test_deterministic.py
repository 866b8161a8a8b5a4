import pytest
import torch

from weather.grid import regular_grid
from weather.metrics import mse, rmse


def test_golden_errors(golden, same):
    fields = golden.forecast, golden.truth, golden.weights
    same(mse(*fields), golden.wb2_mse_chunk)
    same(mse(*fields).mean(1), golden.wb2_mse_timemean)
    same(rmse(*fields).mean(1), golden.wb2_rmse_sqrt_before_time_avg)


@pytest.mark.fault("faults 6")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_fields_are_scored_in_single_precision(dtype):
    """721 x 1440 weights of one add up beyond the largest number of float16."""
    grid = regular_grid(721, 1440, poles=True)
    generator = torch.Generator().manual_seed(0)
    forecast, truth = (torch.randn(2, *grid.shape, generator=generator) * 300).to(dtype)
    weights = grid.area_weights()
    expected = mse(forecast.double(), truth.double(), weights)
    torch.testing.assert_close(
        mse(forecast, truth, weights).double(), expected, rtol=1e-4, atol=1e-2
    )


@pytest.mark.fault("faults 6")
def test_whole_numbers_do_not_truncate_the_weights():
    grid = regular_grid(9, 16, poles=True)
    field = torch.arange(9)[:, None].expand(grid.shape) * 25
    expected = rmse(field.double(), torch.zeros(grid.shape).double(), grid.area_weights())
    found = rmse(field, torch.zeros(grid.shape, dtype=torch.int64), grid.area_weights())
    torch.testing.assert_close(found.double(), expected)
    mean = grid.area_mean(field).double()
    torch.testing.assert_close(mean, grid.area_mean(field.double()))
