"""Scores of the FengWu-Adas repository, for comparison with its logs only.

They weight by the cosine of latitudes that include the poles, with 3.1416 for pi, and differ from
the WeatherBench scores in the third digit (OpenEarthLab/FengWu-Adas, utils/metrics.py).
"""

import torch
from torch import Tensor

from weather.grid import at_least_single


def fengwu_adas_rmse(forecast: Tensor, truth: Tensor, std: Tensor) -> Tensor:
    """Return the RMSE (C,) of normalised (T, C, H, W) in units of ``std`` (C,), averaged in T."""
    forecast, truth = at_least_single(forecast), at_least_single(truth)
    weights = _weights(forecast)
    return (weights * (forecast - truth).square()).mean((-2, -1)).sqrt().mean(0) * std


def fengwu_adas_acc(forecast: Tensor, truth: Tensor, climatology: Tensor) -> Tensor:
    """Return the anomaly correlation (C,) of (T, C, H, W), averaged in T."""
    forecast = at_least_single(forecast) - climatology
    truth = at_least_single(truth) - climatology
    weights = _weights(forecast)
    covariance = (weights * forecast * truth).sum((-2, -1))
    forecast_square = (weights * forecast.square()).sum((-2, -1))
    truth_square = (weights * truth.square()).sum((-2, -1))
    return (covariance / (forecast_square * truth_square).sqrt()).mean(0)


def _weights(field: Tensor) -> Tensor:
    """Return (H, 1) weights in float32, whatever the field, as there."""
    rows = torch.arange(field.shape[-2])
    cosine = (3.1416 / 180.0 * (90.0 - rows * 180.0 / float(len(rows) - 1))).cos()
    return (len(rows) * cosine / cosine.sum())[:, None].to(field)
