"""Classical assimilation methods, which Adas is compared with; they compute on the CPU."""

from weather.baselines.assimilator import Assimilator
from weather.baselines.constant import Climatology, Persistence
from weather.baselines.covariance import (
    Covariance,
    DenseCovariance,
    SampleCovariance,
)
from weather.baselines.ensemble_optimal_interpolation import EnsembleOptimalInterpolation
from weather.baselines.free_run import FreeRun
from weather.baselines.inverse_distance import InverseDistance
from weather.baselines.letkf import LETKF
from weather.baselines.optimal_interpolation import OptimalInterpolation

__all__ = [
    "LETKF",
    "Assimilator",
    "Climatology",
    "Covariance",
    "DenseCovariance",
    "EnsembleOptimalInterpolation",
    "FreeRun",
    "InverseDistance",
    "OptimalInterpolation",
    "Persistence",
    "SampleCovariance",
]
