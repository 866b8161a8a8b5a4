"""Ops of one formula, which autograd differentiates: gates, thresholds, and rows that move.

Half precision is computed in float32 and rounded once.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from core_gates.errors import check_at_least
from core_gates.numerics import accumulation_dtype
from core_gates.ops._select import definition


def gate_multiply(x: Tensor, logits: Tensor) -> Tensor:
    """Return ``x * sigmoid(logits)``.

    Args:
        x: Values to gate, any shape.
        logits: Gate logits of the same shape; the dtype may differ.

    Returns:
        The gated values in the dtype of ``x``.

    Raises:
        ValueError: The shapes differ.
    """
    if x.shape != logits.shape:
        raise ValueError(f"x {tuple(x.shape)} and logits {tuple(logits.shape)} must have one shape")
    return definition(_gate_multiply)(x, logits)


def _gate_multiply(x: Tensor, logits: Tensor) -> Tensor:
    acc = accumulation_dtype(x, logits)
    return (x.to(acc) * logits.to(acc).sigmoid()).to(x.dtype)


def silu_gate(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Gate an activated signal and return it with the gate.

    The gated convolution needs both: ``o = silu(a) * sigmoid(g)`` is its output stream and
    ``sigmoid(g)`` its next confidence stream. Both results are differentiable.

    Args:
        a: Signal before its activation, any shape.
        g: Gate logits of the same shape; the dtype may differ.

    Returns:
        ``silu(a) * sigmoid(g)`` in the dtype of ``a`` and ``sigmoid(g)`` in the dtype of ``g``.

    Raises:
        ValueError: The shapes differ.
    """
    if a.shape != g.shape:
        raise ValueError(f"a {tuple(a.shape)} and g {tuple(g.shape)} must have one shape")
    return definition(_silu_gate)(a, g)


def _silu_gate(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    acc = accumulation_dtype(a, g)
    signal, gate = a.to(acc), g.to(acc).sigmoid()
    return (F.silu(signal) * gate).to(a.dtype), gate.to(g.dtype)


def smooth_step(z: Tensor, gamma: float) -> Tensor:
    """Return a cubic step that is exactly 0 or 1 outside a band (Hazimeh et al., 2020).

    For |z| < γ/2 the value is -2z³/γ³ + 3z/(2γ) + ½; the derivative is continuous, at most 3/(2γ),
    and exactly 0 outside the band.

    Args:
        z: Any shape and floating dtype.
        gamma: Width γ of the band.

    Returns:
        The step in the dtype of ``z``.

    Raises:
        ValueError: ``gamma`` is not positive.
    """
    check_gamma(gamma)
    return definition(_smooth_step)(z, gamma)


def _smooth_step(z: Tensor, gamma: float) -> Tensor:
    place = ((z.to(accumulation_dtype(z)) + gamma / 2) / gamma).clamp(0, 1)
    return (place * place * (3 - 2 * place)).to(z.dtype)


def check_gamma(gamma: float) -> None:
    """Refuse a band without width.

    Raises:
        ValueError: ``gamma`` is not positive and finite.
    """
    if not 0 < gamma < float("inf"):
        raise ValueError(f"gamma must be positive and finite, got {gamma}")


def soft_threshold(x: Tensor, threshold: float) -> Tensor:
    """Move every value towards zero by ``threshold`` and stop there.

    This is the proximal map of ``threshold * |x|_1``, so after a gradient step it solves the L1
    problem; values within the threshold become exactly zero (Ding et al., 2023, equation of SoRA).

    Args:
        x: Values, any shape.
        threshold: ξ, not negative.

    Returns:
        ``sign(x) max(|x| - ξ, 0)`` in the shape and dtype of ``x``.

    Raises:
        ValueError: The threshold is negative or NaN.
    """
    check_at_least(0, threshold=threshold)
    return definition(_soft_threshold)(x, threshold)


def _soft_threshold(x: Tensor, threshold: float) -> Tensor:
    return F.softshrink(x.to(accumulation_dtype(x)), threshold).to(x.dtype)


class ActiveTokens(NamedTuple):
    """A one-to-one map between the active tokens of every sequence and its first slots.

    Attributes:
        slots: Slot of every token (B, T), int64; -1 for a token that has none.
        positions: Token in every slot (B, T'), int64, rising; -1 for an empty slot, of which there
            are only some after the last token.
    """

    slots: Tensor
    positions: Tensor

    @classmethod
    def of(cls, mask: Tensor, num_slots: int | None = None) -> "ActiveTokens":
        """Give the active tokens of every sequence slots in their order.

        Args:
            mask: True at active tokens (B, T).
            num_slots: T', at most T. By default the largest number of active tokens in the batch,
                at least one where there are tokens; finding it out waits for the device. A given
                number waits for nothing and keeps shapes static; tokens that find no slot are left
                out.

        Raises:
            ValueError: The mask is not a boolean (B, T), or ``num_slots`` is negative.
        """
        if mask.dtype != torch.bool or mask.ndim != 2:
            raise ValueError(
                f"mask must be a boolean (batch, tokens), got {mask.dtype} {tuple(mask.shape)}"
            )
        if num_slots is None:
            counts = mask.sum(-1)
            num_slots = max(int(counts.max()), 1) if mask.numel() else 0
        check_at_least(0, num_slots=num_slots)
        num_slots = min(num_slots, mask.shape[1])
        order = mask.cumsum(-1) - 1
        slots = order.masked_fill(~mask | (order >= num_slots), -1)
        tokens = torch.arange(mask.shape[1], device=mask.device).expand_as(slots)
        # Whatever has no slot is written after the last one and cut off.
        after = torch.where(slots < 0, num_slots, slots)
        positions = slots.new_full((mask.shape[0], num_slots + 1), -1)
        return cls(slots, positions.scatter(1, after, tokens)[:, :num_slots])


def compress(x: Tensor, active: ActiveTokens) -> Tensor:
    """Move the active tokens of every sequence to its front (arXiv 2306.11197).

    Args:
        x: Sequences (B, T, D).
        active: Which tokens are active.

    Returns:
        Compressed sequences (B, T', D) in the order of the tokens; zeros in empty slots.

    Raises:
        ValueError: ``x`` is not a batch of sequences of T tokens.
    """
    _check_places("x", x, active.slots)
    return definition(_pick_rows)(x, active.positions)


def extract(y: Tensor, active: ActiveTokens) -> Tensor:
    """Move compressed tokens back to where they came from; the inverse of `compress`.

    Args:
        y: Compressed sequences (B, T', D).
        active: Which tokens are active.

    Returns:
        Sequences (B, T, D) with zeros at all other tokens.

    Raises:
        ValueError: ``y`` is not a batch of T' slots.
    """
    _check_places("y", y, active.positions)
    return definition(_pick_rows)(y, active.slots)


def _check_places(name: str, rows: Tensor, places: Tensor) -> None:
    if rows.ndim != 3 or rows.shape[:2] != places.shape:
        raise ValueError(
            f"{name} {tuple(rows.shape)} must be {tuple(places.shape)} and features; the active"
            " tokens were found for another batch"
        )


def _pick_rows(source: Tensor, rows: Tensor) -> Tensor:
    """Return row ``rows[b, m]`` of every ``source[b]``, and zeros where it is negative."""
    batch, num_rows, dim = source.shape
    first = torch.arange(batch, device=rows.device).unsqueeze(-1) * num_rows
    flat = (rows.clamp(min=0) + first).flatten()
    picked = source.reshape(batch * num_rows, dim).index_select(0, flat)
    return picked.view(batch, rows.shape[1], dim).masked_fill((rows < 0).unsqueeze(-1), 0)
