"""Gates on features: they scale their input and route nothing."""

from core_gates.features.low_rank import LowRankFeatureGate, LowRankFeatureGates
from core_gates.features.prior import PriorGate
from core_gates.features.selection import FeatureSelectionGate, HardAttentionGate
from core_gates.features.self_gate import SelfGate
from core_gates.features.transfer import TransferGate

__all__ = [
    "FeatureSelectionGate",
    "HardAttentionGate",
    "LowRankFeatureGate",
    "LowRankFeatureGates",
    "PriorGate",
    "SelfGate",
    "TransferGate",
]
