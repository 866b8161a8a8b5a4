"""Attention as transformers calls it, when the gate of the module chooses its blocks of keys."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from core_gates.attention.head_gate import RotaryTable, rotate_by
from core_gates.errors import GatesError

NAME = "gates_blocks"
"""What this attention, and the mask that goes with it, are called in transformers."""

CHILD = "block_gate"
"""Name of the gate in the attention module, and so in the state of the model."""

FOREIGN = ("softcap", "sliding_window", "s_aux", "position_bias")
"""Arguments of attention that computes something else."""


class AttentionInputs(NamedTuple):
    """What one call of attention has before it.

    Attributes:
        q: Rotated queries (B, H, T, D), the last T of S tokens.
        k: Rotated keys (B, K, S, D).
        v: Values (B, K, S, D).
        scale: Factor of the scores.
        padding: True (B, S) at padding; None where there is none.
        table: Cosines and sines (B, T, at least D / 2) by which the queries were rotated, which
            come twice in transformers.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    padding: Tensor | None
    table: RotaryTable

    def raw(self) -> tuple[Tensor, Tensor]:
        """Return queries (B, T, H, D) and the keys of the same tokens (B, T, K, D), not rotated."""
        keys = self.k[:, :, -self.q.shape[2] :]
        return unrotated(self.q, self.table), unrotated(keys, self.table)


def unrotated(x: Tensor, table: RotaryTable) -> Tensor:
    """Undo the rotation of queries or keys, a factor of the table such as that of YaRN included.

    Args:
        x: Rotated (B, H, T, D).
        table: Cosines and sines (B, T, at least D / 2), of which the first D / 2 count.

    Returns:
        What was rotated, tokens before heads (B, T, H, D), in the dtype of ``x``.
    """
    cos, sin = (
        part[..., : x.shape[-1] // 2].unsqueeze(-2).to(torch.promote_types(x.dtype, torch.float32))
        for part in table
    )
    square = cos.square() + sin.square()
    return rotate_by(x.transpose(1, 2), (cos / square, -sin / square))


def attend_to_all(seen: AttentionInputs) -> Tensor:
    """Return plain causal attention (B, H, T, D), whose queries are the last tokens."""
    return causal_attention(seen.q, seen.k, seen.v, seen.scale, seen.padding)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, padding: Tensor | None = None
) -> Tensor:
    """Return causal attention (B, H, T, D) of the last T of S tokens; see `AttentionInputs`."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    if padding is None and num_queries == 1:
        return attend_to_token(q, k, v, scale)
    options: dict[str, Any] = {"scale": scale, "enable_gqa": k.shape[1] < q.shape[1]}
    if padding is None and num_queries == num_keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
    key = torch.arange(num_keys, device=q.device)
    itself = key[num_keys - num_queries :, None]
    visible = key <= itself
    if padding is not None:  # which sees itself, so that no query is without a key
        visible = (visible & ~padding[:, None, None]) | (key == itself)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, **options)


def attend_to_token(
    q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Tensor | None = None
) -> Tensor:
    """Return attention (B, H, 1, D) of one token to keys that all query heads of a group share.

    Args:
        q: Queries (B, H, 1, D).
        k: Keys (B, K, S, D), which are read once for a group.
        v: Values (B, K, S, D).
        scale: Factor of the scores.
        visible: True (B, K, 1, S) at keys that are read; None for all.
    """
    rows = q.reshape(len(q), k.shape[1], -1, q.shape[3])
    return F.scaled_dot_product_attention(rows, k, v, attn_mask=visible, scale=scale).view(q.shape)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """Let the gate of a module attend; see `transformers.AttentionInterface`.

    Raises:
        GatesError: There is no gate, or what is asked for is not causal attention of this kind.
    """
    gate: Any = module._modules.get(CHILD)
    if gate is None:
        raise GatesError(
            f"this {type(module).__name__} has no block gate, but attends by {NAME!r}: call"
            " attach_block_gates(model), or model.set_attn_implementation('sdpa')"
        )
    asked = [name for name in FOREIGN if others.get(name) is not None]
    if asked or dropout or (attention_mask is not None and attention_mask.ndim != 2):
        what = asked or (["dropout"] if dropout else ["a mask of pairs"])
        raise GatesError(
            f"{gate.name} attends with {', '.join(what)}, which blocks of keys cannot: give a mask"
            " (B, T) of padding, and a model with plain causal attention"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key = (x.to(value.dtype) for x in (query, key))  # float32 after rotation under autocast
    padding = None if attention_mask is None else ~attention_mask
    out = gate(AttentionInputs(query, key, value, scale, padding, gate.table(query.shape[2])))
    return out.transpose(1, 2), None


def _padding(
    *,
    kv_length: int,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **_others: Any,
) -> Tensor | None:
    """Return the padding (B, S), True at tokens, in place of a mask of every pair; None for none.

    Raises:
        GatesError: Padding is on the right, or there is a mask of another kind.
    """
    if not allow_is_causal_skip and torch.compiler.is_compiling():
        raise GatesError(
            "a model that is compiled is not told whether sequences are packed: give"
            " attention_mask, such as torch.ones_like(tokens), or a cache"
        )
    if not allow_is_causal_skip:
        raise GatesError(
            "sequences are packed, or the model adds another mask, which blocks of keys cannot:"
            " give one sequence a row"
        )
    if attention_mask is None or bool(attention_mask.all()):
        return None
    if attention_mask.shape[1] != kv_length:
        raise GatesError(
            f"attention_mask has {attention_mask.shape[1]} tokens, cache and input {kv_length}:"
            " give a mask of both, and every batch a new cache that has no room for tokens to come,"
            " such as block_cache(model)"
        )
    if not bool(attention_mask[:, -1].all()):
        raise GatesError(
            f"attention_mask {tuple(attention_mask.shape)} has padding on the right, or a row of"
            " nothing else: pad on the left, tokenizer.padding_side = 'left'"
        )
    return attention_mask


def register_block_attention() -> None:
    """Make the attention known to transformers, and the mask of the same name.

    Without the latter, attention would get no mask at all and read padding.
    """
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _padding)
