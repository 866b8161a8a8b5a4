"""Training with gates: gradient routing, proximal steps, batch norm across ranks."""

from core_gates.training.gradient_routing import GradientRouting, RoutedStep
from core_gates.training.proximal import ProximalStep
from core_gates.training.sync_batch_norm import SyncBatchNorm

__all__ = ["GradientRouting", "ProximalStep", "RoutedStep", "SyncBatchNorm"]
