"""Running a causal SeqBoat layer token by token, in time and memory that do not grow."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from core_gates.attention.sma.gated_attention_unit import (
    GatedAttentionUnit,
    Projected,
    score_scale,
    weigh,
)
from core_gates.attention.sma.layer import SeqBoatLayer
from core_gates.ops.compress.op import ActiveTokens, compress, extract
from core_gates.padding import zero_padding


class SeqBoatState(NamedTuple):
    """What a layer keeps of the tokens before.

    Attributes:
        ema: States of the average (B, D, n).
        keys: Keys of the last ``window`` active tokens (B, window, Z), the latest last.
        values: Their values (B, window, V).
        positions: Their positions (B, window), -1 where there were fewer.
        num_tokens: Tokens seen, active or not.
    """

    ema: Tensor
    keys: Tensor
    values: Tensor
    positions: Tensor
    num_tokens: int


def prefill(
    layer: SeqBoatLayer, x: Tensor, *, padding_mask: Tensor | None = None
) -> tuple[Tensor, SeqBoatState]:
    """Process sequences at once and return the results with the state to continue from.

    Args:
        layer: A causal layer without truncation.
        x: Sequences (B, T, D); T may be 0.
        padding_mask: True (B, T) at tokens to ignore. Put it before the tokens: after a prompt it
            counts as time that passes.

    Returns:
        ``layer(x, padding_mask=padding_mask)`` (B, T, D) and the state.

    Raises:
        ValueError: The layer is bidirectional or truncated.
    """
    window = layer.unit.window
    x = zero_padding(x, padding_mask)
    normed = layer.normalize(x, padding_mask=padding_mask)
    ema = layer.ema.state(normed, padding_mask=padding_mask)
    mixed = F.silu(layer.ema(normed, padding_mask=padding_mask))
    mask, confidence = layer.configurator(mixed, padding_mask=padding_mask)
    active = ActiveTokens.of(mask)
    projected = layer.unit.project(compress(mixed, active), active.positions)
    attended = extract(layer.unit.attend(projected, active.positions), active)
    # With a window of empty slots in front, the last window of every sequence begins at its count.
    last = mask.sum(-1, keepdim=True) + torch.arange(window, device=x.device)
    state = SeqBoatState(
        ema,
        _pick(F.pad(projected.key, (0, 0, window, 0)), last),
        _pick(F.pad(projected.value, (0, 0, window, 0)), last),
        F.pad(active.positions, (window, 0), value=-1).gather(1, last),
        x.shape[1],
    )
    return layer.merge(x, mixed, attended, confidence, padding_mask=padding_mask), state


def step(
    layer: SeqBoatLayer,
    x: Tensor,
    state: SeqBoatState,
    *,
    padding_mask: Tensor | None = None,
) -> tuple[Tensor, SeqBoatState]:
    """Process the next token of every sequence.

    Args:
        layer: The layer that made the state.
        x: One token of every sequence (B, D).
        state: State after the tokens before it.
        padding_mask: True (B,) at sequences whose token is to be ignored; its result is 0.

    Returns:
        The result (B, D), that of the whole sequence at this token, and the next state.
    """
    x = zero_padding(x, padding_mask)
    normed = zero_padding(layer.normalize(x, padding_mask=padding_mask), padding_mask)
    averaged, ema = layer.ema.step(normed, state.ema)
    mixed = F.silu(averaged)
    mask, confidence = layer.configurator(mixed, padding_mask=padding_mask)
    position = torch.full_like(state.positions[:, :1], state.num_tokens)
    projected = layer.unit.project(mixed.unsqueeze(1), position)
    keys = torch.cat([state.keys, projected.key], 1)
    values = torch.cat([state.values, projected.value], 1)
    positions = torch.cat([state.positions, position], 1)
    attended = _attend(layer.unit, projected, keys, values, positions)
    y = layer.merge(x, mixed, attended, confidence, padding_mask=padding_mask)
    joins = mask.view(-1, 1, 1)
    following = SeqBoatState(
        ema,
        torch.where(joins, keys[:, 1:], state.keys),
        torch.where(joins, values[:, 1:], state.values),
        torch.where(joins[..., 0], positions[:, 1:], state.positions),
        state.num_tokens + 1,
    )
    return y, following


def _attend(
    unit: GatedAttentionUnit, projected: Projected, keys: Tensor, values: Tensor, positions: Tensor
) -> Tensor:
    """Return the result (B, D) of one token that sees the keys (B, window + 1, Z)."""
    scale = score_scale(unit.key_dim, unit.window, causal=True, weighting=unit.weighting)
    scores = (projected.query * scale) @ keys.mT
    apart = positions - positions[:, -1:]
    if unit.position == "local":
        apart = torch.arange(-unit.window, 1, device=keys.device).expand_as(positions)
    bias = unit.distance_bias(apart)
    if bias is not None:
        scores = scores + bias.unsqueeze(1)
    weights = weigh(scores, (positions < 0).unsqueeze(1), unit.weighting)
    return unit.emit(weights.to(values.dtype) @ values, projected.gate).squeeze(1)


def _pick(rows: Tensor, indices: Tensor) -> Tensor:
    return rows.gather(1, indices.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))
