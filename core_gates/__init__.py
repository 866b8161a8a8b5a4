"""The gating core: gates, fused ops, losses, schedules and monitors in pure PyTorch.

Names are imported when they are first used, so that ``import core_gates`` itself costs nothing:
``from core_gates import TopKGate`` imports PyTorch, and nothing here imports more than that.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from core_gates.adapters.gated_lora import GatedLoraLinear
    from core_gates.adapters.lora_gate import LoraGate
    from core_gates.adapters.soft_threshold import SoftThreshold, gate_l1_loss
    from core_gates.adapters.sparse_low_rank import SparseLowRank
    from core_gates.attention.cross import GatedCrossAttention
    from core_gates.attention.fused_query import fuse_q_proj, split_fused_q_proj
    from core_gates.attention.head_gate import HeadGate
    from core_gates.attention.output_gate import GatedAttention
    from core_gates.attention.seer.decode import CompressedKeys, DecodeAttnGate
    from core_gates.attention.seer.distillation import (
        decode_target,
        gate_distillation_loss,
        prefill_target,
    )
    from core_gates.attention.seer.gate import AttnGate
    from core_gates.attention.seer.selector import BlockSelector, block_density
    from core_gates.attention.sma.configurator import SparseModularActivation
    from core_gates.attention.sma.ema import MultiHeadEMA
    from core_gates.attention.sma.gated_attention_unit import GatedAttentionUnit
    from core_gates.attention.sma.layer import SeqBoatLayer
    from core_gates.conv.gated import GatedConv, PartialConv
    from core_gates.errors import GatesError, MissingExtraError
    from core_gates.features.low_rank import LowRankFeatureGate
    from core_gates.features.selection import FeatureSelectionGate, HardAttentionGate
    from core_gates.features.self_gate import SelfGate
    from core_gates.gates.activation import ActivationGate
    from core_gates.gates.base_layer import BaseLayerGate
    from core_gates.gates.comet import CometGate
    from core_gates.gates.cosine import CosineGate
    from core_gates.gates.dense_to_sparse import DenseToSparseGate
    from core_gates.gates.dselect import DSelectKGate
    from core_gates.gates.expert_choice import ExpertChoiceGate
    from core_gates.gates.gshard import GShardGate
    from core_gates.gates.hard_concrete import HardConcreteGate
    from core_gates.gates.hash import HashGate
    from core_gates.gates.mixture import MaskedMixture, MultiGate
    from core_gates.gates.noisy_top_k import NoisyTopKGate
    from core_gates.gates.permutation import PermutedGate
    from core_gates.gates.predictive import CrossLayerPredictor, PreGate
    from core_gates.gates.remoe import ReMoEGate
    from core_gates.gates.sigmoid import SigmoidGate
    from core_gates.gates.sinkhorn import SinkhornGate
    from core_gates.gates.soft_moe import SoftMoEGate
    from core_gates.gates.softmax import SoftmaxGate
    from core_gates.gates.switch import SwitchGate
    from core_gates.gates.top_k import TopKGate
    from core_gates.gates.top_p import ThresholdGate, TopPGate
    from core_gates.moe.checkpoint_export import export_state_dict
    from core_gates.moe.expert_parallel import ExpertParallel
    from core_gates.moe.experts import StackedExperts
    from core_gates.moe.layer import MoELayer
    from core_gates.moe.normed_experts import NormedExperts
    from core_gates.moe.spawn import spawn_experts
    from core_gates.monitor.hooks import GateMonitor
    from core_gates.monitor.report import GateReport
    from core_gates.ops import kernels
    from core_gates.ops.block_max_attention.op import block_max_attention
    from core_gates.ops.block_sparse_attention.op import block_sparse_attention
    from core_gates.ops.compress.active import ActiveTokens
    from core_gates.ops.compress.op import compress, extract
    from core_gates.ops.gate_multiply.op import gate_multiply
    from core_gates.ops.gated_lora.op import gated_lora
    from core_gates.ops.gated_residual_norm.op import gated_residual_norm
    from core_gates.ops.grouped_linear.op import grouped_linear
    from core_gates.ops.grouped_mlp.op import grouped_mlp
    from core_gates.ops.multi_gate_mix.op import multi_gate_mix
    from core_gates.ops.router.op import router
    from core_gates.ops.silu_gate.op import silu_gate
    from core_gates.ops.smooth_step.op import smooth_step
    from core_gates.ops.soft_threshold.op import soft_threshold
    from core_gates.routing.base import Gate
    from core_gates.routing.capacity import capacity
    from core_gates.routing.causality import refuse_coupled_gates
    from core_gates.routing.collect import collect_routing, routing_gates, update_gates
    from core_gates.routing.counts import count_routed, read_counts
    from core_gates.routing.losses import (
        balance_loss,
        entropy_loss,
        importance_loss,
        information_loss,
        l0_loss,
        orthogonality_loss,
        z_loss,
    )
    from core_gates.routing.output import RoutingOutput
    from core_gates.routing.permutation_search import PermutationSearch
    from core_gates.routing.schedules import (
        PiecewiseSchedule,
        SparsitySchedule,
        StagedSchedule,
        TemperatureSchedule,
    )
    from core_gates.surgery import fold_gates, inject_gates, prune_gates
    from core_gates.training.gradient_routing import GradientRouting
    from core_gates.training.proximal import ProximalStep
    from core_gates.training.sync_batch_norm import SyncBatchNorm

_HOMES = {
    "ActivationGate": "gates.activation",
    "ActiveTokens": "ops.compress.active",
    "AttnGate": "attention.seer.gate",
    "BaseLayerGate": "gates.base_layer",
    "BlockSelector": "attention.seer.selector",
    "CometGate": "gates.comet",
    "CompressedKeys": "attention.seer.decode",
    "CosineGate": "gates.cosine",
    "CrossLayerPredictor": "gates.predictive",
    "DSelectKGate": "gates.dselect",
    "DecodeAttnGate": "attention.seer.decode",
    "DenseToSparseGate": "gates.dense_to_sparse",
    "ExpertChoiceGate": "gates.expert_choice",
    "ExpertParallel": "moe.expert_parallel",
    "FeatureSelectionGate": "features.selection",
    "GShardGate": "gates.gshard",
    "Gate": "routing.base",
    "GateMonitor": "monitor.hooks",
    "GateReport": "monitor.report",
    "GatedAttention": "attention.output_gate",
    "GatedAttentionUnit": "attention.sma.gated_attention_unit",
    "GatedConv": "conv.gated",
    "GatedCrossAttention": "attention.cross",
    "GatedLoraLinear": "adapters.gated_lora",
    "GatesError": "errors",
    "GradientRouting": "training.gradient_routing",
    "HardAttentionGate": "features.selection",
    "HardConcreteGate": "gates.hard_concrete",
    "HashGate": "gates.hash",
    "HeadGate": "attention.head_gate",
    "LoraGate": "adapters.lora_gate",
    "LowRankFeatureGate": "features.low_rank",
    "MaskedMixture": "gates.mixture",
    "MissingExtraError": "errors",
    "MoELayer": "moe.layer",
    "MultiGate": "gates.mixture",
    "MultiHeadEMA": "attention.sma.ema",
    "NoisyTopKGate": "gates.noisy_top_k",
    "NormedExperts": "moe.normed_experts",
    "PartialConv": "conv.gated",
    "PermutationSearch": "routing.permutation_search",
    "PermutedGate": "gates.permutation",
    "PiecewiseSchedule": "routing.schedules",
    "PreGate": "gates.predictive",
    "ProximalStep": "training.proximal",
    "ReMoEGate": "gates.remoe",
    "RoutingOutput": "routing.output",
    "SelfGate": "features.self_gate",
    "SeqBoatLayer": "attention.sma.layer",
    "SigmoidGate": "gates.sigmoid",
    "SinkhornGate": "gates.sinkhorn",
    "SoftMoEGate": "gates.soft_moe",
    "SoftThreshold": "adapters.soft_threshold",
    "SoftmaxGate": "gates.softmax",
    "SparseLowRank": "adapters.sparse_low_rank",
    "SparseModularActivation": "attention.sma.configurator",
    "SparsitySchedule": "routing.schedules",
    "StackedExperts": "moe.experts",
    "StagedSchedule": "routing.schedules",
    "SwitchGate": "gates.switch",
    "SyncBatchNorm": "training.sync_batch_norm",
    "TemperatureSchedule": "routing.schedules",
    "ThresholdGate": "gates.top_p",
    "TopKGate": "gates.top_k",
    "TopPGate": "gates.top_p",
    "balance_loss": "routing.losses",
    "block_density": "attention.seer.selector",
    "block_max_attention": "ops.block_max_attention.op",
    "block_sparse_attention": "ops.block_sparse_attention.op",
    "capacity": "routing.capacity",
    "collect_routing": "routing.collect",
    "compress": "ops.compress.op",
    "count_routed": "routing.counts",
    "decode_target": "attention.seer.distillation",
    "entropy_loss": "routing.losses",
    "export_state_dict": "moe.checkpoint_export",
    "extract": "ops.compress.op",
    "fold_gates": "surgery",
    "fuse_q_proj": "attention.fused_query",
    "gate_distillation_loss": "attention.seer.distillation",
    "gate_l1_loss": "adapters.soft_threshold",
    "gate_multiply": "ops.gate_multiply.op",
    "gated_lora": "ops.gated_lora.op",
    "gated_residual_norm": "ops.gated_residual_norm.op",
    "grouped_linear": "ops.grouped_linear.op",
    "grouped_mlp": "ops.grouped_mlp.op",
    "importance_loss": "routing.losses",
    "information_loss": "routing.losses",
    "inject_gates": "surgery",
    "kernels": "ops",
    "l0_loss": "routing.losses",
    "multi_gate_mix": "ops.multi_gate_mix.op",
    "orthogonality_loss": "routing.losses",
    "prefill_target": "attention.seer.distillation",
    "prune_gates": "surgery",
    "read_counts": "routing.counts",
    "refuse_coupled_gates": "routing.causality",
    "router": "ops.router.op",
    "routing_gates": "routing.collect",
    "silu_gate": "ops.silu_gate.op",
    "smooth_step": "ops.smooth_step.op",
    "soft_threshold": "ops.soft_threshold.op",
    "spawn_experts": "moe.spawn",
    "split_fused_q_proj": "attention.fused_query",
    "update_gates": "routing.collect",
    "z_loss": "routing.losses",
}

__all__ = [
    "ActivationGate",
    "ActiveTokens",
    "AttnGate",
    "BaseLayerGate",
    "BlockSelector",
    "CometGate",
    "CompressedKeys",
    "CosineGate",
    "CrossLayerPredictor",
    "DSelectKGate",
    "DecodeAttnGate",
    "DenseToSparseGate",
    "ExpertChoiceGate",
    "ExpertParallel",
    "FeatureSelectionGate",
    "GShardGate",
    "Gate",
    "GateMonitor",
    "GateReport",
    "GatedAttention",
    "GatedAttentionUnit",
    "GatedConv",
    "GatedCrossAttention",
    "GatedLoraLinear",
    "GatesError",
    "GradientRouting",
    "HardAttentionGate",
    "HardConcreteGate",
    "HashGate",
    "HeadGate",
    "LoraGate",
    "LowRankFeatureGate",
    "MaskedMixture",
    "MissingExtraError",
    "MoELayer",
    "MultiGate",
    "MultiHeadEMA",
    "NoisyTopKGate",
    "NormedExperts",
    "PartialConv",
    "PermutationSearch",
    "PermutedGate",
    "PiecewiseSchedule",
    "PreGate",
    "ProximalStep",
    "ReMoEGate",
    "RoutingOutput",
    "SelfGate",
    "SeqBoatLayer",
    "SigmoidGate",
    "SinkhornGate",
    "SoftMoEGate",
    "SoftThreshold",
    "SoftmaxGate",
    "SparseLowRank",
    "SparseModularActivation",
    "SparsitySchedule",
    "StackedExperts",
    "StagedSchedule",
    "SwitchGate",
    "SyncBatchNorm",
    "TemperatureSchedule",
    "ThresholdGate",
    "TopKGate",
    "TopPGate",
    "balance_loss",
    "block_density",
    "block_max_attention",
    "block_sparse_attention",
    "capacity",
    "collect_routing",
    "compress",
    "count_routed",
    "decode_target",
    "entropy_loss",
    "export_state_dict",
    "extract",
    "fold_gates",
    "fuse_q_proj",
    "gate_distillation_loss",
    "gate_l1_loss",
    "gate_multiply",
    "gated_lora",
    "gated_residual_norm",
    "grouped_linear",
    "grouped_mlp",
    "importance_loss",
    "information_loss",
    "inject_gates",
    "kernels",
    "l0_loss",
    "multi_gate_mix",
    "orthogonality_loss",
    "prefill_target",
    "prune_gates",
    "read_counts",
    "refuse_coupled_gates",
    "router",
    "routing_gates",
    "silu_gate",
    "smooth_step",
    "soft_threshold",
    "spawn_experts",
    "split_fused_q_proj",
    "update_gates",
    "z_loss",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
