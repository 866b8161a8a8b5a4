"""Low-rank adapters whose ranks or outputs are gated."""

from core_gates.adapters.attachment import (
    GatedSiblings,
    SiblingLinear,
    attach_adapters,
    attach_siblings,
    detach_adapters,
)
from core_gates.adapters.gated_lora import GatedLoraLinear
from core_gates.adapters.lora_gate import DiffusionTime, LoraGate, OpenGate
from core_gates.adapters.low_rank import AdapterCapacity, LowRank, side_by_side
from core_gates.adapters.relevance import RelevanceGate
from core_gates.adapters.sparse_low_rank import (
    SoftThreshold,
    SparseLoraLinear,
    SparseLowRank,
    gate_l1_loss,
    rank_gates,
)

__all__ = [
    "AdapterCapacity",
    "DiffusionTime",
    "GatedLoraLinear",
    "GatedSiblings",
    "LoraGate",
    "LowRank",
    "OpenGate",
    "RelevanceGate",
    "SiblingLinear",
    "SoftThreshold",
    "SparseLoraLinear",
    "SparseLowRank",
    "attach_adapters",
    "attach_siblings",
    "detach_adapters",
    "gate_l1_loss",
    "rank_gates",
    "side_by_side",
]
