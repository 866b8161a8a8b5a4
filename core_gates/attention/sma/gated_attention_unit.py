"""The gated attention unit of SeqBoat, local and with a bias of distances."""

from typing import Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_gates.attention.head_gate import rotate
from core_gates.errors import check_at_least, check_option
from core_gates.numerics import accumulation_dtype, zero_padding


class DistanceBias(nn.Module):
    """Look up a learned bias for the distance of a key from its query (Raffel et al., 2020).

    Distances beyond either end of the table take the entry at that end.

    Args:
        max_positions: Distances from 1 - max_positions to max_positions - 1 have entries.
        device: Device of the table.
        dtype: Floating dtype of the table.

    Shape:
        Distances of any shape, int64, key minus query; biases of the same shape.

    Raises:
        ValueError: ``max_positions`` is below 1.
    """

    def __init__(
        self,
        max_positions: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least(1, max_positions=max_positions)
        self.max_positions = max_positions
        self.table = nn.Parameter(torch.empty(2 * max_positions - 1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table from N(0, 0.02²)."""
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, distance: Tensor) -> Tensor:
        """Return the bias of every distance."""
        entries = (distance + self.max_positions - 1).clamp(0, 2 * self.max_positions - 2)
        return self.table.index_select(0, entries.flatten()).view(entries.shape)


Weighting = Literal["softmax", "relu2"]


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int,
    causal: bool,
    weighting: Weighting,
    filled: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Let every slot attend to filled slots at most ``window`` away.

    The sequence is cut into blocks of ``window`` queries, and the keys of a block are those of its
    neighborhood: the block before it, itself and, unless ``causal``, the block after it. Time and
    memory are O(N window).

    - ``softmax``: weights ``softmax(q k / √Z + bias)``;
    - ``relu2``: weights ``relu(q k / c + bias)²`` with c the size of the neighborhood on both
      sides, ``window`` if causal, else ``2 window`` (Ma et al., 2022).

    A slot without any filled neighbor gets a finite result.

    Args:
        query: Queries (B, N, Z).
        key: Keys (B, N, Z).
        value: Values (B, N, V).
        window: Farthest neighbor, in slots.
        causal: Whether later slots are hidden.
        weighting: How scores become weights.
        filled: True (B, N) at slots that may be attended to.
        bias: Added to the scores, broadcastable to those of `in_blocks`:
            (B, blocks, window, span).

    Returns:
        Attended values (B, N, V).

    Raises:
        ValueError: ``window`` is below 1 or ``weighting`` is unknown.
    """
    check_attention(window, weighting)
    num_slots, key_dim = query.shape[1:]
    if query.shape[0] * num_slots == 0:
        everything = query.sum() + key.sum() + (0 if bias is None else bias.sum())
        return value * everything  # empty, with a gradient for every input
    scale = score_scale(key_dim, window, causal=causal, weighting=weighting)
    queries = in_blocks(query * scale, window)
    keys = in_neighborhoods(key, window, causal=causal)
    scores = queries @ keys.mT
    if bias is not None:
        scores = scores + bias
    hidden = ~in_neighborhoods(filled.unsqueeze(-1), window, causal=causal).mT
    hidden = hidden | _too_far(window, causal, query.device)
    weights = weigh(scores, hidden, weighting)
    attended = weights.to(value.dtype) @ in_neighborhoods(value, window, causal=causal)
    return attended.flatten(1, 2)[:, :num_slots]


def score_scale(key_dim: int, window: int, *, causal: bool, weighting: Weighting) -> float:
    """Return the factor of the dot product of a query and a key."""
    if weighting == "softmax":
        return float(key_dim**-0.5)
    return 1 / (window if causal else 2 * window)


def weigh(scores: Tensor, hidden: Tensor, weighting: Weighting) -> Tensor:
    """Return the weights of the keys (..., keys), none for those ``hidden`` if any other is seen.

    Softmax is computed in float32 at least. Without any key to see, its weights are equal.
    """
    if weighting == "relu2":
        return scores.masked_fill(hidden, 0).relu().square()
    exact = scores.to(accumulation_dtype(scores))
    return exact.masked_fill(hidden, torch.finfo(exact.dtype).min).softmax(-1)


def in_blocks(slots: Tensor, window: int) -> Tensor:
    """Cut (B, N, D) into (B, blocks, window, D), zeros after the last slot."""
    missing = -slots.shape[1] % window
    batch, num_slots, dim = slots.shape
    num_blocks = (num_slots + missing) // window
    return F.pad(slots, (0, 0, 0, missing)).reshape(batch, num_blocks, window, dim)


def in_neighborhoods(slots: Tensor, window: int, *, causal: bool) -> Tensor:
    """Return the neighborhood (B, blocks, span, D) of every block, zeros beyond both ends.

    The span is 2 or, unless ``causal``, 3 windows; key c of a block is its slot ``c - window``.
    """
    blocks = in_blocks(slots, window)
    before = F.pad(blocks, (0, 0, 0, 0, 1, 0))[:, :-1]
    if causal:
        return torch.cat([before, blocks], 2)
    return torch.cat([before, blocks, F.pad(blocks, (0, 0, 0, 0, 0, 1))[:, 1:]], 2)


def distances(window: int, *, causal: bool, device: torch.device) -> Tensor:
    """Return key minus query (window, span), in slots."""
    span = (2 if causal else 3) * window
    keys = torch.arange(-window, span - window, device=device)
    return keys - torch.arange(window, device=device).unsqueeze(-1)


def check_attention(window: int, weighting: str) -> None:
    """Refuse settings of `local_attention`.

    Raises:
        ValueError: ``window`` is below 1 or ``weighting`` is unknown.
    """
    check_at_least(1, window=window)
    check_option("weighting", weighting, get_args(Weighting))


def _too_far(window: int, causal: bool, device: torch.device) -> Tensor:
    apart = distances(window, causal=causal, device=device)
    return (apart < -window) | (apart > (0 if causal else window))


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
        """Project tokens ``x`` (B, N, D) at ``positions`` (B, N) to queries, keys and values."""
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
