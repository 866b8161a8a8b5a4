"""Scores of single forecasts, with the definitions of WeatherBench 2 and WeatherBench-X.

Fields are (..., H, W); ``weights`` are (H,) or (H, W), see `weather.metrics.regions.spatial_mean`.
"""

from torch import Tensor

from weather.grid import at_least_single
from weather.metrics.regions import spatial_mean


def bias(forecast: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    """Return the mean error (...,)."""
    return spatial_mean(_difference(forecast, truth), weights)


def mae(forecast: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    """Return the mean absolute error (...,)."""
    return spatial_mean(_difference(forecast, truth).abs(), weights)


def mse(forecast: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    """Return the mean square error (...,)."""
    return spatial_mean(_difference(forecast, truth).square(), weights)


def rmse(
    forecast: Tensor, truth: Tensor, weights: Tensor, *, time_dim: int | None = None
) -> Tensor:
    """Return the root mean square error.

    Args:
        forecast: (..., H, W).
        truth: (..., H, W).
        weights: Of the rows or cells.
        time_dim: Dimension over which the mean square is averaged before the root is taken (the
            present convention of WeatherBench); None takes the root of every field.

    Returns:
        (...,), without the time dimension if there is one.
    """
    square = mse(forecast, truth, weights)
    if time_dim is not None:
        square = square.mean(_leading(time_dim, forecast))
    return square.sqrt()


def wind_vector_mse(
    forecast: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor], weights: Tensor
) -> Tensor:
    """Return the mean square length (...,) of the error of the wind (u, v)."""
    return mse(forecast[0], truth[0], weights) + mse(forecast[1], truth[1], weights)


def activity(forecast: Tensor, climatology: Tensor, weights: Tensor) -> Tensor:
    """Return the root mean square anomaly (...,) of the forecast from the climatology."""
    return mse(forecast, climatology, weights).sqrt()


def acc(
    forecast: Tensor,
    truth: Tensor,
    climatology: Tensor,
    weights: Tensor,
    *,
    pooled_dim: int | None = None,
) -> Tensor:
    """Return the anomaly correlation, without centering.

    Args:
        forecast: (..., H, W).
        truth: (..., H, W).
        climatology: (..., H, W) of the day and hour of each field.
        weights: Of the rows or cells.
        pooled_dim: Dimension over which the three second moments are averaged before their ratio
            is taken (WeatherBench-X); None correlates every field (WeatherBench 2, whose score is
            the mean over time of these).

    Returns:
        (...,), without the pooled dimension if there is one.
    """
    forecast_anomaly = _difference(forecast, climatology)
    truth_anomaly = _difference(truth, climatology)
    moments = [
        spatial_mean(product, weights)
        for product in (
            forecast_anomaly * truth_anomaly,
            forecast_anomaly.square(),
            truth_anomaly.square(),
        )
    ]
    if pooled_dim is not None:
        moments = [moment.mean(_leading(pooled_dim, forecast)) for moment in moments]
    covariance, forecast_variance, truth_variance = moments
    return covariance / (forecast_variance * truth_variance).sqrt()


def _difference(field: Tensor, other: Tensor) -> Tensor:
    """Return the difference in single precision at least, as its square may exceed half."""
    return at_least_single(field) - at_least_single(other)


def _leading(dim: int, field: Tensor) -> int:
    """Return the position of a dimension of (..., H, W) once H and W are gone."""
    position = dim % field.ndim
    if position >= field.ndim - 2:
        raise ValueError(f"dimension {dim} of a field {tuple(field.shape)} is not before (H, W)")
    return position
