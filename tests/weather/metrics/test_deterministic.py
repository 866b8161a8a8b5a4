import pytest
import torch

from weather.grid import regular_grid
from weather.metrics import acc, activity, bias, mae, mse, rmse, wind_vector_mse


def test_golden_errors(golden, same):
    fields = golden.forecast, golden.truth, golden.weights
    same(mse(*fields), golden.wb2_mse_chunk)
    same(mse(*fields).mean(1), golden.wb2_mse_timemean)
    same(mae(*fields).mean(1), golden.wb2_mae)
    same(bias(*fields).mean(1), golden.wb2_bias)
    same(rmse(*fields).mean(1), golden.wb2_rmse_sqrt_before_time_avg)
    same(rmse(*fields, time_dim=1), golden.wbx_rmse)
    same(rmse(*fields, time_dim=-4), golden.wbx_rmse)


def test_golden_wind(golden, same):
    forecast, truth = (field[1:].unbind() for field in (golden.forecast, golden.truth))
    same(wind_vector_mse(forecast, truth, golden.weights).mean(0), golden.wb2_wind_vector_mse)


def test_golden_anomalies(golden, same):
    fields = golden.forecast, golden.truth, golden.climatology_at_valid, golden.weights
    same(acc(*fields), golden.wb2_acc_chunk)
    same(acc(*fields).mean(1), golden.wb2_acc_timemean)
    same(acc(*fields, pooled_dim=1), golden.wbx_acc)
    squares = activity(golden.forecast, golden.climatology_at_valid, golden.weights).square()
    same(squares.mean(1).sqrt(), golden.wbx_activity)


def test_a_space_dimension_cannot_be_time():
    field = torch.zeros(3, 4, 8)
    with pytest.raises(ValueError, match="not before"):
        rmse(field, field, torch.ones(4), time_dim=-1)


@pytest.mark.fault("faults 6")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_fields_are_scored_in_single_precision(dtype):
    """721 x 1440 weights of one add up beyond the largest number of float16."""
    grid = regular_grid(721, 1440, poles=True)
    generator = torch.Generator().manual_seed(0)
    forecast, truth = (torch.randn(2, *grid.shape, generator=generator) * 300).to(dtype)
    climatology = torch.zeros_like(truth)
    weights = grid.area_weights()
    wide = forecast.double(), truth.double()
    for score in (mse, mae, bias):
        expected = score(*wide, weights)
        torch.testing.assert_close(
            score(forecast, truth, weights).double(), expected, rtol=1e-4, atol=1e-2
        )
    for score in (acc, activity):
        arguments = (wide, (forecast, truth))
        fine, coarse = (
            score(*(one[:1] if score is activity else one), climatology.to(one[0]), weights)
            for one in arguments
        )
        torch.testing.assert_close(coarse.double(), fine, rtol=1e-4, atol=1e-4)


@pytest.mark.fault("faults 6")
def test_whole_numbers_do_not_truncate_the_weights():
    grid = regular_grid(9, 16, poles=True)
    field = torch.arange(9)[:, None].expand(grid.shape) * 25
    expected = mae(field.double(), torch.zeros(grid.shape).double(), grid.area_weights())
    found = mae(field, torch.zeros(grid.shape, dtype=torch.int64), grid.area_weights())
    torch.testing.assert_close(found.double(), expected)
    torch.testing.assert_close(grid.area_mean(field).double(), expected)
