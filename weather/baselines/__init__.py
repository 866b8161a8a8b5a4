"""Classical assimilation methods, which Adas is compared with; they compute on the CPU."""

from weather.baselines.assimilator import Assimilator
from weather.baselines.constant import Climatology, Persistence
from weather.baselines.covariance import (
    Covariance,
    DenseCovariance,
    SampleCovariance,
)
from weather.baselines.free_run import FreeRun
from weather.baselines.inverse_distance import InverseDistance
from weather.baselines.letkf import LETKF
from weather.baselines.nudging import Nudging
from weather.baselines.optimal_interpolation import OptimalInterpolation
from weather.baselines.variational.control import ControlVariable, DenseControl
from weather.baselines.variational.four_d_var import FourDVar
from weather.baselines.variational.spectral import SpectralCovariance
from weather.baselines.variational.three_d_var import ThreeDVar

__all__ = [
    "LETKF",
    "Assimilator",
    "Climatology",
    "ControlVariable",
    "Covariance",
    "DenseControl",
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
