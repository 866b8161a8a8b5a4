"""Scores: plain functions of tensors, with the definitions of WeatherBench."""

from weather.metrics.climatology import climatology_at
from weather.metrics.cycling import drift, recovery_time, skilful_lead_time, trend
from weather.metrics.deterministic import acc, activity, bias, mae, mse, rmse, wind_vector_mse
from weather.metrics.ensemble import (
    crps,
    crps_skill,
    crps_spread,
    ensemble_mean_mse,
    ensemble_variance,
    rank_histogram,
    spread_skill_ratio,
    unbiased_mean_mse,
    unbiased_mean_rmse,
)
from weather.metrics.fengwu_adas import fengwu_adas_acc, fengwu_adas_rmse
from weather.metrics.observation_space import DepartureSums, ensemble_signal
from weather.metrics.regions import REGIONS, mask_weights, region_weights, spatial_mean
from weather.metrics.significance import PairedDifference, paired_difference
from weather.metrics.spectra import mean_spectrum, zonal_energy_spectrum, zonal_wavelength

__all__ = [
    "REGIONS",
    "DepartureSums",
    "PairedDifference",
    "acc",
    "activity",
    "bias",
    "climatology_at",
    "crps",
    "crps_skill",
    "crps_spread",
    "drift",
    "ensemble_mean_mse",
    "ensemble_signal",
    "ensemble_variance",
    "fengwu_adas_acc",
    "fengwu_adas_rmse",
    "mae",
    "mask_weights",
    "mean_spectrum",
    "mse",
    "paired_difference",
    "rank_histogram",
    "recovery_time",
    "region_weights",
    "rmse",
    "skilful_lead_time",
    "spatial_mean",
    "spread_skill_ratio",
    "trend",
    "unbiased_mean_mse",
    "unbiased_mean_rmse",
    "wind_vector_mse",
    "zonal_energy_spectrum",
    "zonal_wavelength",
]
