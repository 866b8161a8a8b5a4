"""Sparse modular activation: attention that runs on the tokens which ask for it (SeqBoat)."""

from core_gates.attention.sma.ema import MultiHeadEMA
from core_gates.attention.sma.gated_attention_unit import (
    DistanceBias,
    GatedAttentionUnit,
    local_attention,
)
from core_gates.attention.sma.layer import (
    ScaleNorm,
    SeqBoatLayer,
    SeqBoatState,
    SparseModularActivation,
    TokenActivation,
    TokenBatchNorm,
    prefill,
    step,
)

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
