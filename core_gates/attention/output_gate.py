"""Attention with a gate at one of five places."""

from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core_gates.activations import GateActivation
from core_gates.attention.head_gate import (
    INIT_STD,
    NORM_EPS,
    Form,
    Granularity,
    HeadGate,
    KeyValueCache,
    RotaryTable,
    Sharing,
    rotary_table,
    rotate_by,
)
from core_gates.errors import check_option
from core_gates.numerics import accumulation_dtype, zero_padding

Position = Literal["none", "G1", "G2", "G3", "G4", "G5"]


class GatedAttention(nn.Module):
    """Self-attention with a gate computed from its input (arXiv 2505.06708).

    The gate sits at ``G1`` the output of the heads, before the output projection (the paper's
    choice); ``G2`` the values; ``G3`` the keys or ``G4`` the queries, before norm and rotation;
    ``G5`` the result. The input is the normed input of the block.

    Args:
        dim: Features of a token.
        num_heads: Number of query heads.
        num_kv_heads: Number of key and value heads, a divisor of ``num_heads``, the default.
        head_dim: Features of a head; ``dim / num_heads`` if None.
        position: Place of the gate; ``none`` is plain attention.
        granularity: One gate per feature or one per head; G5 has no heads and is ``elementwise``.
        sharing: See `HeadGate`.
        form: See `HeadGate`.
        activation: See `HeadGate`.
        input_dependent: See `HeadGate`.
        gate_bias_init: ``bias_init`` of `HeadGate`; with ``qkv_bias`` 0 if None.
        qk_norm: Whether queries and keys go through an RMSNorm over the features of a head.
        norm_eps: Added to the mean square in these norms.
        qkv_bias: Whether all projections have a bias, that of the gate and of the result included,
            as in published models with this option.
        causal: Whether no token sees a later one.
        rope_theta: Base of the rotary embedding; no positions if None.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Attributes:
        attend: Takes the place of attention of whole sequences, without padding and after nothing
            in a cache, such as by blocks: called with queries, keys and values of all heads, as
            `project` returns them, and the table of their rotation, it returns what the heads read
            (B, num_heads, T, head_dim). None by default.

    Shape:
        ``x`` (B, T, dim) to (B, T, dim).

    Raises:
        ValueError: Heads do not divide, or an option is unknown or does not fit the position.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        head_dim: int | None = None,
        position: Position = "G1",
        granularity: Granularity = "elementwise",
        sharing: Sharing = "head_specific",
        form: Form = "multiplicative",
        activation: GateActivation = "sigmoid",
        input_dependent: bool = True,
        gate_bias_init: float | None = None,
        qk_norm: bool = False,
        norm_eps: float = NORM_EPS,
        qkv_bias: bool = False,
        causal: bool = True,
        rope_theta: float | None = 10000.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads={num_kv_heads} must divide num_heads={num_heads}")
        if head_dim is None and dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}; set head_dim")
        check_option("position", position, get_args(Position))
        if position == "G5" and (granularity, sharing) != ("elementwise", "head_specific"):
            raise ValueError("a gate at G5 has no heads: use elementwise and head_specific")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        self.position, self.rope_theta, self.causal = position, rope_theta, causal
        if qkv_bias and gate_bias_init is None:
            gate_bias_init = 0.0
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        inner, kv_inner = num_heads * self.head_dim, num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(dim, inner, bias=qkv_bias, **options)
        self.k_proj = nn.Linear(dim, kv_inner, bias=qkv_bias, **options)
        self.v_proj = nn.Linear(dim, kv_inner, bias=qkv_bias, **options)
        self.o_proj = nn.Linear(inner, dim, bias=qkv_bias, **options)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=norm_eps, **options) if qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, eps=norm_eps, **options) if qk_norm else None
        self.gate = None
        self.attend: nn.Module | None = None
        if position != "none":
            self.gate = HeadGate(
                dim,
                *self._gated_heads(dim),
                granularity=granularity,
                sharing=sharing,
                form=form,
                activation=activation,
                input_dependent=input_dependent,
                bias_init=gate_bias_init,
                device=device,
                dtype=dtype,
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights from N(0, 0.02²); biases start at zero, norms at one."""
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            nn.init.normal_(projection.weight, std=INIT_STD)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                norm.reset_parameters()
        if self.gate is not None:
            self.gate.reset_parameters()

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        padding_mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        rotary: RotaryTable | None = None,
    ) -> Tensor:
        """Attend among the tokens of ``x`` and, with a cache, to those before.

        Args:
            x: Tokens (B, T, dim), the normed input of the block.
            positions: Positions (B, T) or (T,) for the rotation; if None, the tokens of the cache
                and of ``x`` are counted from 0, padding included.
            padding_mask: True (B, T) at tokens to ignore; their result is 0.
            cache: What the layer has seen before; the tokens of ``x`` are added to it.
            rotary: ``rotary_table(positions, head_dim, rope_theta, dtype=x.dtype)``, computed once
                for all layers, in place of ``positions``.

        Raises:
            ValueError: The mask, the cache or the table does not fit, or the layer is not causal
                and got a cache.
        """
        if cache is not None and not self.causal:
            raise ValueError("a cache needs causal attention: earlier results would change")
        x = zero_padding(x, padding_mask)
        num_before = 0 if cache is None else len(cache)
        if rotary is None and self.rope_theta is not None:
            if positions is None:
                positions = torch.arange(num_before, num_before + x.shape[1], device=x.device)
            rotary = rotary_table(positions, self.head_dim, self.rope_theta, dtype=x.dtype)
        elif rotary is not None:
            self._check_rotary(rotary[0], x, positions)
        q, k, v = self.project(x, rotary)
        ignored = padding_mask
        if cache is not None:
            k, v, ignored = cache.extend(k, v, padding_mask=padding_mask)
        mask = self._visible(x.shape[1], num_before, ignored, x.device)
        if self.attend is None or mask is not None or num_before:
            heads = self._attend(q, k, v, mask)
        else:
            heads = self.attend(q, k, v, rotary)
        y = self._gated("G1", x, heads.transpose(1, 2)).flatten(-2)
        result: Tensor = self._gated("G5", x, self.o_proj(y).unsqueeze(-2)).squeeze(-2)
        return zero_padding(result, padding_mask)

    def gate_values(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,  # noqa: ARG002
        padding_mask: Tensor | None = None,
        cache: KeyValueCache | None = None,  # noqa: ARG002
        rotary: RotaryTable | None = None,  # noqa: ARG002
    ) -> Tensor:
        """Return the gates (B, T, heads or 1, features or 1), none for position ``none``.

        With a ``padding_mask``, those of the N tokens that are not ignored, (N, ...).
        """
        if self.gate is None:
            return x.new_zeros(*x.shape[:-1], 0, 0)
        values = self.gate.gate_values(x)
        return values if padding_mask is None else values[~padding_mask]

    def project(self, x: Tensor, rotary: RotaryTable | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of all heads, gated where set, then rotated.

        Args:
            x: Tokens (B, T, dim).
            rotary: Table of the positions; no rotation if None.

        Returns:
            q (B, num_heads, T, head_dim), k and v (B, num_kv_heads, T, head_dim).
        """
        shape = (-1, self.head_dim)
        q = self._gated("G4", x, self.q_proj(x).unflatten(-1, shape))
        k = self._gated("G3", x, self.k_proj(x).unflatten(-1, shape))
        v = self._gated("G2", x, self.v_proj(x).unflatten(-1, shape))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            cos, sin = (t.unsqueeze(-2) for t in rotary)  # the same for all heads
            q, k = (rotate_by(t, (cos, sin)) for t in (q, k))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _check_rotary(self, cos: Tensor, x: Tensor, positions: Tensor | None) -> None:
        if positions is not None or self.rope_theta is None:
            raise ValueError(
                "rotary takes the place of positions, in a layer with a rope_theta: give rotary"
                f" alone, got positions too or rope_theta={self.rope_theta}"
            )
        shape, dtype = (x.shape[1], self.head_dim // 2), accumulation_dtype(x)
        if cos.shape[-2:] != shape or cos.dtype != dtype:
            raise ValueError(
                f"rotary {tuple(cos.shape)} in {cos.dtype} must end with {shape} and be in {dtype}:"
                f" call rotary_table(positions, {self.head_dim}, rope_theta, dtype=x.dtype)"
            )

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Return the results (B, num_heads, T, head_dim) of the heads."""
        group, length = self.num_heads // self.num_kv_heads, q.shape[2]
        if group > 1 and length < k.shape[2] and length <= self.head_dim:
            # The queries of one key head become its rows: copies of all keys would cost more.
            rows = q.reshape(q.shape[0], k.shape[1], -1, self.head_dim)
            if mask is not None and length > 1:
                mask = torch.cat([mask] * group, -2)
            heads = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask)
            return heads.reshape(q.shape)
        if group > 1:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        square = self.causal and mask is None and length > 1  # one token sees all before it
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=square)

    def _visible(
        self, length: int, num_before: int, ignored: Tensor | None, device: torch.device
    ) -> Tensor | None:
        """Return which keys the queries see, bool, broadcastable to (B, 1, T, S + T).

        None stands for all keys, or for all keys up to the query's own if the map is square.
        """
        simple = not self.causal or num_before == 0 or length == 1
        if ignored is None and simple:
            return None
        shape = (length, num_before + length)
        itself = torch.arange(length, device=device).unsqueeze(-1) + num_before
        keys = torch.arange(shape[1], device=device)
        seen = keys <= itself if self.causal else torch.ones(shape, dtype=torch.bool, device=device)
        if ignored is None:
            return seen
        # Padding sees itself, so that no query is without a key.
        return (seen & ~ignored[:, None, None, :]) | (keys == itself)

    def _gated_heads(self, dim: int) -> tuple[int, int]:
        """Return the heads of the gated tensor and their features."""
        if self.position == "G5":
            return 1, dim
        return self.num_kv_heads if self.position in ("G2", "G3") else self.num_heads, self.head_dim

    def _gated(self, position: Position, x: Tensor, y: Tensor) -> Tensor:
        if self.gate is None or position != self.position:
            return y
        return cast(Tensor, self.gate(x, y))

    def extra_repr(self) -> str:
        """Show the heads and the place of the gate."""
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads},"
            f" head_dim={self.head_dim}, position={self.position}"
        )
