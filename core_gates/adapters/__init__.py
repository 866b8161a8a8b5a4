"""Low-rank adapters whose ranks or outputs are gated."""

from core_gates.adapters.attachment import attach_adapters, detach_adapters
from core_gates.adapters.gated_lora import GatedLoraLinear
from core_gates.adapters.lora_gate import LoraGate
from core_gates.adapters.low_rank import LowRank
from core_gates.adapters.soft_threshold import SoftThreshold, gate_l1_loss, rank_gates
from core_gates.adapters.sparse_lora_linear import SparseLoraLinear
from core_gates.adapters.sparse_low_rank import SparseLowRank

__all__ = [
    "GatedLoraLinear",
    "LoraGate",
    "LowRank",
    "SoftThreshold",
    "SparseLoraLinear",
    "SparseLowRank",
    "attach_adapters",
    "detach_adapters",
    "gate_l1_loss",
    "rank_gates",
]
