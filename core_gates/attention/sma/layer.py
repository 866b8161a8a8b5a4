"""A layer of SeqBoat: which tokens enter attention, and their norms."""

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_gates.attention.sma.ema import MultiHeadEMA
from core_gates.attention.sma.gated_attention_unit import (
    GatedAttentionUnit,
    PositionEncoding,
    Projected,
    Weighting,
    score_scale,
    weigh,
)
from core_gates.errors import check_at_least, check_fraction, check_positive
from core_gates.numerics import accumulation_dtype, check_padding_mask, linear_fp32, zero_padding
from core_gates.ops.elementwise import ActiveTokens, compress, extract


class ScaleNorm(nn.Module):
    """Divide a token by its root mean square and multiply it by one learned number.

    Nguyen & Salazar, 2019, with the mean in place of the sum of squares.

    Args:
        eps: Added to the mean square.
        device: Device of the parameter.
        dtype: Floating dtype of the parameter.

    Shape:
        (..., D) to the same.
    """

    def __init__(
        self,
        *,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the scale to one."""
        nn.init.ones_(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normed tokens."""
        exact = x.to(accumulation_dtype(x))
        mean_square = exact.square().mean(-1, keepdim=True)
        return (exact * (mean_square + self.eps).rsqrt() * self.scale).to(x.dtype)


class TokenBatchNorm(nn.Module):
    """Apply a batch norm to every feature over all tokens of all sequences.

    Args:
        norm: Norm of (N, D), such as ``torch.nn.BatchNorm1d(D)`` or a synchronized one.

    Shape:
        (B, T, D) to the same.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def reset_parameters(self) -> None:
        """Reset the norm, running statistics included."""
        self.norm.reset_parameters()  # type: ignore[operator]

    def forward(self, x: Tensor, *, padding_mask: Tensor | None = None) -> Tensor:
        """Return the normed tokens; padding is in no statistic and its result is 0.

        With a mask the number of tokens is read on the host, as the norm gets the tokens alone.

        Args:
            x: Tokens (B, T, D).
            padding_mask: True (B, T) at tokens to ignore.

        Raises:
            ValueError: The mask is not boolean or has another shape.
        """
        if padding_mask is None:
            normed: Tensor = self.norm(x.flatten(0, -2))
            return normed.view(x.shape)
        check_padding_mask(padding_mask, x.shape[:-1])
        normed = self.norm(x[~padding_mask])
        return normed.new_zeros(x.shape).index_put((~padding_mask,), normed)


class TokenActivation(NamedTuple):
    """What a configurator decides for every token.

    Attributes:
        mask: True where the module runs (B, T).
        confidence: Probability of running, at least 1/2, where it runs, else exactly 0 (B, T);
            float32 at least. The only way back for gradients.
    """

    mask: Tensor
    confidence: Tensor


class SparseModularActivation(nn.Module):
    """Decide token by token whether a module runs (Ren et al., 2023, arXiv 2306.11197).

    ``P = softmax((x W + b) / τ)`` over {off, on} with a learned temperature ``τ = exp(θ)``. The
    module runs where *on* is more probable, and its result is multiplied by that probability, the
    confidence. No noise is drawn. A tie is off.

    Args:
        dim: Features D of a token.
        tau_scale: s of the first temperature ``s √D``.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters; the decision is computed in float32 at least.

    Shape:
        ``x`` (B, T, D), or with any other leading shape; results have the leading shape.

    Raises:
        ValueError: ``dim`` is below 1 or the scale is not positive.
    """

    def __init__(
        self,
        dim: int,
        *,
        tau_scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least(1, dim=dim)
        check_positive(tau_scale=tau_scale)
        self.dim = dim
        self.tau_scale = tau_scale
        self.weight = nn.Parameter(torch.empty(2, dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(2, device=device, dtype=dtype))
        self.log_tau = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from N(0, 0.02²), zero the bias, and set the first temperature."""
        nn.init.trunc_normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)
        nn.init.constant_(self.log_tau, math.log(self.tau_scale * math.sqrt(self.dim)))

    def logits(self, x: Tensor, *, padding_mask: Tensor | None = None) -> Tensor:
        """Return ``(x W + b) / τ`` (..., 2) for off and on."""
        scores = linear_fp32(x, self.weight, self.bias, padding_mask=padding_mask)
        return scores / self.log_tau.to(scores.dtype).exp()

    def forward(self, x: Tensor, *, padding_mask: Tensor | None = None) -> TokenActivation:
        """Decide for every token; the module never runs where ``padding_mask`` (...) is True.

        Raises:
            ValueError: ``x`` or the mask has another shape.
        """
        logits = self.logits(x, padding_mask=padding_mask)
        mask = logits[..., 1] > logits[..., 0]
        if padding_mask is not None:
            mask = mask & ~padding_mask
        return TokenActivation(mask, logits.softmax(-1)[..., 1].masked_fill(~mask, 0))

    def gate_values(self, x: Tensor, *, padding_mask: Tensor | None = None) -> Tensor:
        """Return the confidences, exactly 0 where the module does not run, without padding."""
        confidence: Tensor = self(x, padding_mask=padding_mask).confidence
        if padding_mask is None:
            return confidence
        check_padding_mask(padding_mask, confidence.shape)
        return confidence[~padding_mask]

    def extra_repr(self) -> str:
        """Show the sizes in ``print(configurator)``."""
        return f"dim={self.dim}"


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
        position: ``simple``, ``local`` or ``rotary``; see `GatedAttentionUnit`.
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
