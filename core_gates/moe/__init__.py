"""Mixtures of experts: the layer, experts, dispatch, upcycling and expert parallelism."""

from core_gates.moe.checkpoint_export import export_state_dict
from core_gates.moe.dense_mlp import GatedMlp
from core_gates.moe.expert_parallel import ExpertParallel, expert_parameters
from core_gates.moe.experts import StackedExperts
from core_gates.moe.layer import MoELayer
from core_gates.moe.normed_experts import NormedExperts
from core_gates.moe.spawn import advance_gates, spawn_experts

__all__ = [
    "ExpertParallel",
    "GatedMlp",
    "MoELayer",
    "NormedExperts",
    "StackedExperts",
    "advance_gates",
    "expert_parameters",
    "export_state_dict",
    "spawn_experts",
]
