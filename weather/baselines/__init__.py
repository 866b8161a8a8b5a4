"""Classical assimilation methods, which Adas is compared with; they compute on the CPU."""

from weather.baselines.assimilator import (
    Assimilator,
    Climatology,
    FreeRun,
    InverseDistance,
    Nudging,
    Persistence,
)
from weather.baselines.covariance import Covariance, DenseCovariance, SampleCovariance
from weather.baselines.letkf import LETKF
from weather.baselines.minimizer import ControlVariable
from weather.baselines.optimal_interpolation import OptimalInterpolation
from weather.baselines.spectral_covariance import SpectralCovariance
from weather.baselines.variational import FourDVar, ThreeDVar

__all__ = [
    "LETKF",
    "Assimilator",
    "Climatology",
    "ControlVariable",
    "Covariance",
    "DenseCovariance",
    "FourDVar",
    "FreeRun",
    "InverseDistance",
    "Nudging",
    "OptimalInterpolation",
    "Persistence",
    "SampleCovariance",
    "SpectralCovariance",
    "ThreeDVar",
]
