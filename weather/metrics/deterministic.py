"""Scores of single forecasts, with the definitions of WeatherBench 2 and WeatherBench-X.

Fields are (..., H, W); ``weights`` are (H,) or (H, W), see `weather.metrics.regions.spatial_mean`.
"""

from torch import Tensor

from weather.grid import at_least_single
from weather.metrics.regions import spatial_mean


def mse(forecast: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    """Return the mean square error (...,).

    The difference is in single precision at least, as its square may exceed half.
    """
    difference = at_least_single(forecast) - at_least_single(truth)
    return spatial_mean(difference.square(), weights)


def rmse(forecast: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    """Return the root mean square error (...,) of every field."""
    return mse(forecast, truth, weights).sqrt()
