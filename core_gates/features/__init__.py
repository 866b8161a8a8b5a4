"""Gates on features: they scale their input and route nothing."""

from core_gates.features.low_rank import LowRankFeatureGate
from core_gates.features.selection import FeatureSelectionGate, HardAttentionGate
from core_gates.features.self_gate import SelfGate

__all__ = ["FeatureSelectionGate", "HardAttentionGate", "LowRankFeatureGate", "SelfGate"]
