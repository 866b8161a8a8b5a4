"""Gates on features: they scale their input and route nothing."""

from core_gates.features.low_rank import LowRankFeatureGate, LowRankFeatureGates
from core_gates.features.prior import PriorGate, SelfGate, TransferGate
from core_gates.features.selection import FeatureSelectionGate, HardAttentionGate

__all__ = [
    "FeatureSelectionGate",
    "HardAttentionGate",
    "LowRankFeatureGate",
    "LowRankFeatureGates",
    "PriorGate",
    "SelfGate",
    "TransferGate",
]
