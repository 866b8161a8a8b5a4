"""Training with gates: gradient routing, proximal steps, batch normalization."""

from core_gates.training.batch_norm_recalibration import recalibrate_batch_norm
from core_gates.training.gradient_routing import GradientRouting, RoutedStep
from core_gates.training.proximal import ProximalStep
from core_gates.training.sync_batch_norm import SyncBatchNorm

__all__ = [
    "GradientRouting",
    "ProximalStep",
    "RoutedStep",
    "SyncBatchNorm",
    "recalibrate_batch_norm",
]
