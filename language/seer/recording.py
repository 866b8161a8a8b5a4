"""What block gates learn from: pooled queries and keys of a sequence, and where it attended."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from core_gates.attention.seer.decode import DecodeAttnGate
from core_gates.attention.seer.gate import (
    AttnGate,
    PooledBlocks,
    decode_target,
    pool_blocks,
    prefill_target,
)
from core_gates.ops import block_max_attention
from language.hf.locate import base_of
from language.seer.attach import Attend, BlockGate, block_gates
from language.seer.attention import AttentionInputs

ROWS = 128
"""Tokens of a sequence, of its second half, that a gate for decoding learns from."""

Record = Mapping[str, Tensor]
"""Of one layer and B sequences: ``queries``, ``keys``, ``target``, and ``rows`` for decoding."""


def rows_of(length: int) -> Tensor:
    """Return positions of the second half of a sequence, at even distances, 128 at most."""
    first = length // 2
    return torch.linspace(first, length - 1, min(ROWS, length - first)).round().long()


def inputs_of(gate: BlockGate, seen: AttentionInputs) -> dict[str, Tensor]:
    """Return the inputs of a gate, its record without the target."""
    inner, (q, k) = gate.gate, seen.raw()
    if isinstance(inner, AttnGate):
        pooled = inner.pool(q, k)
        return {"queries": pooled.queries, "keys": pooled.keys}
    rows = rows_of(q.shape[1]).to(q.device)
    keys = pool_blocks(k, inner.block_size, inner.k_kinds)
    return {"queries": q[:, rows], "keys": keys, "rows": rows.expand(len(q), -1)}


def record(gate: BlockGate, seen: AttentionInputs) -> tuple[Tensor, dict[str, Tensor]]:
    """Attend to everything, and return the output and what the gate learns from."""
    inner = gate.gate
    decodes = isinstance(inner, DecodeAttnGate)
    out, _, largest = block_max_attention(
        seen.q, seen.k, seen.v, inner.block_size, scale=seen.scale, per_row=decodes
    )
    if decodes:
        rows = rows_of(largest.shape[2]).to(largest.device)
        target = decode_target(largest[:, :, rows], inner.num_kv_heads)
    else:
        target = prefill_target(largest)
    return out, {**inputs_of(gate, seen), "target": target}


def logits_of(gate: AttnGate | DecodeAttnGate, record: Record) -> Tensor:
    """Return the logits of a gate for what was recorded of its layer, shaped as the target."""
    if isinstance(gate, AttnGate):
        return gate.score(PooledBlocks(record["queries"], record["keys"]))
    return gate.score(record["queries"], record["rows"][0], record["keys"])


@contextmanager
def attending(model: nn.Module, attend: Attend) -> Iterator[None]:
    """Let a function take the place of attention in all layers with block gates."""
    gates = block_gates(model).values()
    for gate in gates:
        gate.attend = attend
    try:
        yield
    finally:
        for gate in gates:
            gate.attend = None


def read(model: nn.Module, tokens: Tensor, attend: Attend) -> None:
    """Run the model without its head over a sequence (T,)."""
    with torch.inference_mode(), attending(model, attend):
        base_of(model)(tokens.unsqueeze(0), use_cache=False)


def record_sequence(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """Run a model with block gates once over a sequence (T,), and return what they learn from.

    Returns:
        Records of all layers, named by layer and part, such as ``layers.0.self_attn.keys``, of one
        sequence and so without the first dimension.
    """
    kept: dict[str, Tensor] = {}

    def attend(gate: BlockGate, seen: AttentionInputs) -> Tensor:
        out, parts = record(gate, seen)
        kept.update({f"{gate.name}.{part}": value[0] for part, value in parts.items()})
        return out

    read(model, tokens, attend)
    return kept


def record_bytes(model: nn.Module, length: int) -> int:
    """Return the bytes of what is recorded of a sequence of so many tokens."""
    total, rows = 0, len(rows_of(length))
    for one in block_gates(model).values():
        gate = one.gate
        blocks, heads, groups = -(-length // gate.block_size), gate.num_heads, gate.num_kv_heads
        total += blocks * groups * gate.head_dim * len(gate.k_kinds)
        if isinstance(gate, AttnGate):
            total += blocks * heads * (gate.head_dim * len(gate.q_kinds) + blocks)
        else:
            total += rows * (heads * gate.head_dim + groups * blocks + 2)
    return 4 * total
