"""Scores: plain functions of tensors, with the definitions of WeatherBench."""

from weather.metrics.cycling import drift, recovery_time, trend
from weather.metrics.deterministic import mse, rmse
from weather.metrics.observation_space import DepartureSums
from weather.metrics.regions import spatial_mean

__all__ = ["DepartureSums", "drift", "mse", "recovery_time", "rmse", "spatial_mean", "trend"]
