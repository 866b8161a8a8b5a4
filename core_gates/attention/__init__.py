"""Attention with gates around it: over windows of a grid, blocks of text, or active tokens.

Padding is one contract: where ``padding_mask`` is True, a token is ignored whatever it holds, NaN
included, in results, gradients and statistics, and its own result, where it has one, is 0.
"""

from core_gates.attention import sma
from core_gates.attention.cross import GatedCrossAttention
from core_gates.attention.head_gate import (
    HeadGate,
    KeyValueCache,
    fuse_q_proj,
    rotary_table,
    rotate,
    split_fused_q_proj,
)
from core_gates.attention.output_gate import GatedAttention
from core_gates.attention.seer.decode import (
    BlockSelector,
    CompressedKeys,
    DecodeAttnGate,
    block_density,
)
from core_gates.attention.seer.gate import (
    AttnGate,
    PooledBlocks,
    decode_target,
    gate_distillation_loss,
    prefill_target,
)
from core_gates.attention.sma import (
    GatedAttentionUnit,
    MultiHeadEMA,
    ScaleNorm,
    SeqBoatLayer,
    SeqBoatState,
    SparseModularActivation,
    TokenBatchNorm,
)
from core_gates.attention.window import SwinBlock, WindowAttention, WindowLayout

__all__ = [
    "AttnGate",
    "BlockSelector",
    "CompressedKeys",
    "DecodeAttnGate",
    "GatedAttention",
    "GatedAttentionUnit",
    "GatedCrossAttention",
    "HeadGate",
    "KeyValueCache",
    "MultiHeadEMA",
    "PooledBlocks",
    "ScaleNorm",
    "SeqBoatLayer",
    "SeqBoatState",
    "SparseModularActivation",
    "SwinBlock",
    "TokenBatchNorm",
    "WindowAttention",
    "WindowLayout",
    "block_density",
    "decode_target",
    "fuse_q_proj",
    "gate_distillation_loss",
    "prefill_target",
    "rotary_table",
    "rotate",
    "sma",
    "split_fused_q_proj",
]
