"""Sparse modular activation: attention that runs on the tokens which ask for it (SeqBoat)."""

from core_gates.attention.sma.configurator import SparseModularActivation, TokenActivation
from core_gates.attention.sma.distance_bias import DistanceBias
from core_gates.attention.sma.ema import MultiHeadEMA
from core_gates.attention.sma.gated_attention_unit import GatedAttentionUnit
from core_gates.attention.sma.layer import SeqBoatLayer
from core_gates.attention.sma.local_attention import local_attention
from core_gates.attention.sma.norms import ScaleNorm, TokenBatchNorm
from core_gates.attention.sma.streaming import SeqBoatState, prefill, step

__all__ = [
    "DistanceBias",
    "GatedAttentionUnit",
    "MultiHeadEMA",
    "ScaleNorm",
    "SeqBoatLayer",
    "SeqBoatState",
    "SparseModularActivation",
    "TokenActivation",
    "TokenBatchNorm",
    "local_attention",
    "prefill",
    "step",
]
