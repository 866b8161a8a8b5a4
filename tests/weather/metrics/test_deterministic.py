import pytest
import torch

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
