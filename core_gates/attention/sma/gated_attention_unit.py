"""The gated attention unit, over compressed tokens."""

from typing import Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_gates.attention.rotary import rotate
from core_gates.attention.sma.distance_bias import DistanceBias
from core_gates.attention.sma.local_attention import (
    Weighting,
    check_attention,
    distances,
    in_blocks,
    in_neighborhoods,
    local_attention,
)
from core_gates.errors import check_at_least, check_option
from core_gates.padding import zero_padding

PositionEncoding = Literal["simple", "local", "rotary"]


class Projected(NamedTuple):
    """What a token contributes to attention: queries and keys (B, N, Z), values (B, N, V), gate."""

    query: Tensor
    key: Tensor
    value: Tensor
    gate: Tensor


class GatedAttentionUnit(nn.Module):
    """Attend with one small head and gate the result feature by feature (Hua et al., 2022).

    ``z, r, v = split(silu(x W))``; queries and keys are ``z γ_i + β_i``; the result is
    ``(attention(q, k, v) r) W'``. Attention reaches ``window`` slots back and, unless causal, as
    far ahead.

    Args:
        dim: Features D of a token.
        key_dim: Features Z of queries and keys.
        hidden_dim: Features V of values and gates.
        window: Farthest neighbor, in slots.
        causal: Whether later slots are hidden.
        weighting: ``softmax`` or ``relu2``.
        position: ``simple``, a learned bias for the distance of the original positions; ``local``,
            one for the distance in slots; ``rotary``, rotations by the original positions.
        max_positions: Distances that the ``simple`` bias distinguishes.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Shape:
        ``x`` (B, N, D) and positions (B, N) to (B, N, D).

    Raises:
        ValueError: A size is below 1, an option is unknown, or ``key_dim`` is odd under ``rotary``.
    """

    def __init__(
        self,
        dim: int,
        key_dim: int,
        hidden_dim: int,
        *,
        window: int,
        causal: bool = True,
        weighting: Weighting = "softmax",
        position: PositionEncoding = "rotary",
        max_positions: int = 1024,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least(1, dim=dim, key_dim=key_dim, hidden_dim=hidden_dim)
        check_attention(window, weighting)
        check_option("position", position, get_args(PositionEncoding))
        if position == "rotary" and key_dim % 2:
            raise ValueError(f"rotary positions turn pairs: key_dim must be even, got {key_dim}")
        self.key_dim, self.hidden_dim = key_dim, hidden_dim
        self.window, self.causal = window, causal
        self.weighting: Weighting = weighting
        self.position: PositionEncoding = position
        where = {"device": device, "dtype": dtype}
        self.input_proj = nn.Linear(dim, key_dim + 2 * hidden_dim, **where)  # type: ignore[arg-type]
        self.output_proj = nn.Linear(hidden_dim, dim, **where)  # type: ignore[arg-type]
        self.gamma = nn.Parameter(torch.empty(2, key_dim, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.empty(2, key_dim, device=device, dtype=dtype))
        self.bias = None
        if position != "rotary":
            reach = 3 * window if position == "local" else max_positions
            self.bias = DistanceBias(reach, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights, γ and the position bias from N(0, 0.02²); zero all other biases."""
        for linear in (self.input_proj, self.output_proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        nn.init.trunc_normal_(self.gamma, std=0.02)
        nn.init.zeros_(self.beta)
        if self.bias is not None:
            self.bias.reset_parameters()

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Attend among the slots of every sequence.

        Args:
            x: Compressed tokens (B, N, D); what an empty slot holds is ignored.
            positions: Original position of every slot (B, N), -1 for an empty one.

        Returns:
            Results (B, N, D); those of empty slots mean nothing.
        """
        return self.attend(self.project(zero_padding(x, positions < 0), positions), positions)

    def project(self, x: Tensor, positions: Tensor) -> Projected:
        """Return what the tokens ``x`` (B, N, D) at ``positions`` (B, N) contribute."""
        features = F.silu(self.input_proj(x))
        sizes = [self.key_dim, self.hidden_dim, self.hidden_dim]
        shared, gate, value = features.split_with_sizes(sizes, -1)
        query, key = (shared.unsqueeze(-2) * self.gamma + self.beta).unbind(-2)
        if self.position == "rotary":
            query, key = (rotate(t, positions, interleaved=True) for t in (query, key))
        return Projected(query, key, value, gate)

    def attend(self, projected: Projected, positions: Tensor) -> Tensor:
        """Return the results (B, N, D) of the projected tokens at ``positions`` (B, N)."""
        attended = local_attention(
            projected.query,
            projected.key,
            projected.value,
            window=self.window,
            causal=self.causal,
            weighting=self.weighting,
            filled=positions >= 0,
            bias=self._bias(positions),
        )
        return self.emit(attended, projected.gate)

    def emit(self, attended: Tensor, gate: Tensor) -> Tensor:
        """Return the results (..., D) for attended values and gates (..., V)."""
        return cast(Tensor, self.output_proj(attended * gate))

    def extra_repr(self) -> str:
        """Show the options in ``print(unit)``."""
        return (
            f"window={self.window}, causal={self.causal}, weighting={self.weighting},"
            f" position={self.position}"
        )

    def distance_bias(self, distance: Tensor) -> Tensor | None:
        """Return the bias for distances in slots under ``local``, else in positions.

        The published ``local`` table is shifted by one window, which is kept for its weights.
        """
        if self.bias is None:
            return None
        shift = self.window if self.position == "local" else 0
        return cast(Tensor, self.bias(distance + shift))

    def _bias(self, positions: Tensor) -> Tensor | None:
        if self.position == "rotary":
            return None
        if self.position == "local":
            apart = distances(self.window, causal=self.causal, device=positions.device)
        else:
            places = positions.unsqueeze(-1)
            keys = in_neighborhoods(places, self.window, causal=self.causal)
            apart = keys.mT - in_blocks(places, self.window)
        return self.distance_bias(apart)
