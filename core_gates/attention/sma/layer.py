"""The SeqBoat layer: an average over all tokens, and attention for those that ask for it."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_gates.attention.sma.configurator import SparseModularActivation
from core_gates.attention.sma.ema import MultiHeadEMA
from core_gates.attention.sma.gated_attention_unit import GatedAttentionUnit, PositionEncoding
from core_gates.attention.sma.local_attention import Weighting
from core_gates.attention.sma.norms import TokenBatchNorm
from core_gates.errors import check_fraction
from core_gates.ops.compress.op import ActiveTokens, compress, extract
from core_gates.padding import zero_padding


class SeqBoatLayer(nn.Module):
    """Mix tokens by an average, and by attention where it is worth it (arXiv 2306.11197).

    ``m = silu(EMA(norm(x)))``; the configurator reads m and activates some tokens with
    confidence c; these are compressed into a short sequence, where a gated attention unit computes
    o, zero for all other tokens; the result is ``silu(m W + c o + x)``. The work is O(D T log T)
    for the average and O(window) for every active token.

    The results of a sequence do not depend on the others of its batch, unless the norm mixes them.

    Args:
        dim: Features D of a token.
        key_dim: Features of queries and keys.
        hidden_dim: Features of values.
        num_states: States of a feature of the average.
        window: Farthest neighbor in attention, in active tokens.
        causal: Whether no token sees a later one.
        weighting: ``softmax`` or ``relu2``.
        position: ``simple``, ``local`` or ``rotary``; see :class:`GatedAttentionUnit`.
        max_positions: Distances that the ``simple`` positions distinguish.
        truncation: Longest lag of the average, in tokens; None for all.
        tau_scale: First temperature of the configurator, in units of √D.
        dropout: Rate of dropout on o or, if causal, on ``m W + c o``.
        norm: Norm of (B, T, D), a ``LayerNorm`` if None.
        prenorm: Whether the norm is applied to x before everything else, or to the result.
        static_shapes: Whether attention always gets T slots: nothing waits for the device and
            shapes are known to ``torch.compile`` and ``torch.export``, but no work is saved.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Shape:
        ``x`` (B, T, D) to the same.

    Raises:
        ValueError: A size or rate is out of range or an option is unknown.
    """

    def __init__(
        self,
        dim: int,
        key_dim: int,
        hidden_dim: int,
        *,
        num_states: int = 16,
        window: int = 128,
        causal: bool = True,
        weighting: Weighting = "softmax",
        position: PositionEncoding = "rotary",
        max_positions: int = 1024,
        truncation: int | None = None,
        tau_scale: float = 1.0,
        dropout: float = 0.0,
        norm: nn.Module | None = None,
        prenorm: bool = True,
        static_shapes: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_fraction(dropout=dropout)
        self.causal, self.prenorm = causal, prenorm
        self.static_shapes = static_shapes
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype) if norm is None else norm
        self.ema = MultiHeadEMA(
            dim,
            num_states,
            bidirectional=not causal,
            truncation=truncation,
            device=device,
            dtype=dtype,
        )
        self.configurator = SparseModularActivation(
            dim, tau_scale=tau_scale, device=device, dtype=dtype
        )
        self.unit = GatedAttentionUnit(
            dim,
            key_dim,
            hidden_dim,
            window=window,
            causal=causal,
            weighting=weighting,
            position=position,
            max_positions=max_positions,
            device=device,
            dtype=dtype,
        )
        self.carry_proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.dropout = nn.Dropout(dropout)
        self._reset_carry()

    def reset_parameters(self) -> None:
        """Reset every part."""
        for part in (self.ema, self.configurator, self.unit):
            part.reset_parameters()
        if hasattr(self.norm, "reset_parameters"):
            self.norm.reset_parameters()  # type: ignore[operator]
        self._reset_carry()

    def forward(self, x: Tensor, *, padding_mask: Tensor | None = None) -> Tensor:
        """Process whole sequences.

        Args:
            x: Sequences (B, T, D).
            padding_mask: True (B, T) at tokens to ignore; their result is 0.

        Raises:
            ValueError: ``x`` or the mask has another shape.
        """
        x = zero_padding(x, padding_mask)
        mixed = self.mix(x, padding_mask=padding_mask)
        mask, confidence = self.configurator(mixed, padding_mask=padding_mask)
        active = ActiveTokens.of(mask, x.shape[1] if self.static_shapes else None)
        attended = extract(self.unit(compress(mixed, active), active.positions), active)
        return self.merge(x, mixed, attended, confidence, padding_mask=padding_mask)

    def mix(self, x: Tensor, *, padding_mask: Tensor | None = None) -> Tensor:
        """Return ``silu(EMA(norm(x)))`` (B, T, D)."""
        normed = self.normalize(x, padding_mask=padding_mask)
        return F.silu(self.ema(normed, padding_mask=padding_mask))

    def normalize(self, x: Tensor, *, padding_mask: Tensor | None = None) -> Tensor:
        """Return the norm of x if it comes before everything else, else x."""
        return self._norm(x, padding_mask) if self.prenorm else x

    def merge(
        self,
        x: Tensor,
        mixed: Tensor,
        attended: Tensor,
        confidence: Tensor,
        *,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the result (..., D) from its parts (..., D) and the confidence (...)."""
        attended = confidence.unsqueeze(-1).to(attended.dtype) * attended
        if self.causal:
            update = self.dropout(self.carry_proj(mixed) + attended)
        else:
            update = self.carry_proj(mixed) + self.dropout(attended)
        result = F.silu(update + x)
        if not self.prenorm:
            result = self._norm(result, padding_mask)
        return zero_padding(result, padding_mask)

    def _norm(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        options = {"padding_mask": padding_mask} if isinstance(self.norm, TokenBatchNorm) else {}
        return cast(Tensor, self.norm(x, **options))

    def _reset_carry(self) -> None:
        nn.init.trunc_normal_(self.carry_proj.weight, std=0.02)
        nn.init.zeros_(self.carry_proj.bias)
