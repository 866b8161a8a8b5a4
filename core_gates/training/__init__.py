"""Training with gates: gradient routing, proximal steps, batch normalization."""

from core_gates.training.batch_norm import SyncBatchNorm, recalibrate_batch_norm
from core_gates.training.gradient_routing import GradientRouting, RoutedStep
from core_gates.training.proximal import ProximalStep
from core_gates.training.thresholds import ThresholdSchedule, growing, threshold_for

__all__ = [
    "GradientRouting",
    "ProximalStep",
    "RoutedStep",
    "SyncBatchNorm",
    "ThresholdSchedule",
    "growing",
    "recalibrate_batch_norm",
    "threshold_for",
]
