"""Attention within shifted windows, and the transformer block made of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from core_gates.attention.constants import INIT_STD
from core_gates.attention.window.drop_path import DropPath
from core_gates.attention.window.layout import Extents, WindowLayout, shape_constant


class WindowAttention(nn.Module):
    """Multi-head attention within windows, with a relative position bias (Swin, arXiv 2103.14030).

    Args:
        dim: Channels.
        num_heads: Number of heads.
        window: Extents of a window in depth, latitude and longitude.
        legacy_clip: Where a grid is smaller than the window, pair cells with the entries of the
            position table as FengWu-Adas does, which takes the first rows and columns of the full
            window's index (only to load its weights); otherwise pair them by their true offsets.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Raises:
        ValueError: ``dim`` is not a multiple of ``num_heads``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: Extents,
        *,
        legacy_clip: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads={num_heads}, found {dim}")
        super().__init__()
        self.dim = dim
        self.num_heads = num_heads
        self.window: Extents = (window[0], window[1], window[2])
        self.legacy_clip = legacy_clip
        table_size = (2 * window[0] - 1) * (2 * window[1] - 1) * (2 * window[2] - 1)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.qkv = nn.Linear(dim, 3 * dim, **options)
        self.proj = nn.Linear(dim, dim, **options)
        self.position_bias = nn.Parameter(torch.empty(table_size, num_heads, **options))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights and position bias from a truncated normal; biases start at zero."""
        nn.init.trunc_normal_(self.position_bias, std=INIT_STD)
        for linear in (self.qkv, self.proj):
            _init_linear(linear)

    def forward(self, query: Tensor, key: Tensor | None, layout: WindowLayout) -> Tensor:
        """Attend from ``query`` to ``key``, or to ``query`` itself where ``key`` is None.

        Args:
            query: Windows ``(B, num_windows, N, C)`` as ``layout`` cuts them.
            key: Windows of the same shape that give keys and values.
            layout: The cut, made with this module's window.

        Returns:
            ``(B, num_windows, N, C)``.
        """
        q, k, v = self._project(query, key)
        bias = self._bias(layout, query.device)
        attend = _fused_attention if query.is_cuda else _attention
        y = attend(q, k, v, bias, query.shape[1])  # (B * num_windows, heads, head_dim, N)
        y = y.permute(0, 3, 1, 2).reshape(query.shape)
        return F.linear(y, self.proj.weight, self.proj.bias)

    def _project(self, query: Tensor, key: Tensor | None) -> tuple[Tensor, ...]:
        """Return q, k and v, each ``(B * num_windows, heads, head_dim, N)``."""
        batch, num_windows, num_cells, dim = query.shape
        weight, bias = self.qkv.weight, self.qkv.bias
        if key is None:
            parts = [F.linear(query, weight, bias)]
        else:
            parts = [
                F.linear(query, weight[:dim], bias[:dim]),
                F.linear(key, weight[dim:], bias[dim:]),
            ]
        windows, split = (batch * num_windows, num_cells), (self.num_heads, dim // self.num_heads)
        heads = (
            part.view(*windows, part.shape[-1] // dim, *split)
            .permute(2, 0, 3, 4, 1)
            .contiguous()
            .unbind(0)
            for part in parts
        )
        return tuple(head for group in heads for head in group)

    def _bias(self, layout: WindowLayout, device: torch.device) -> Tensor:
        """Return position bias plus shift mask, ``(masked windows or 1, 1, heads, N, N)``."""
        index = shape_constant(
            _position_index, layout.window, self.window, self.legacy_clip, device
        )
        table = self.position_bias.index_select(0, index.view(-1))
        bias: Tensor = table.view(1, 1, *index.shape, -1).permute(0, 1, 4, 2, 3)
        mask = layout.mask(device)
        if mask is not None:
            bias = bias + mask[:, None, None].to(bias.dtype)
        return bias


def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, num_windows: int) -> Tensor:
    """Attend in windows of a few cells, where explicit matmuls beat the fused kernels on CPU.

    Features come before cells, because small matmuls are fast along the longer side.
    """
    scores = (q * q.shape[-2] ** -0.5).transpose(-1, -2) @ k
    group = (len(q) // num_windows, len(bias), num_windows // len(bias))
    grouped = scores.view(*group, *scores.shape[1:]) + bias
    weights: Tensor = grouped.view(scores.shape).softmax(-1)
    return v @ weights.transpose(-1, -2)


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, num_windows: int) -> Tensor:
    group = (len(q) // num_windows, len(bias), num_windows // len(bias))
    bias = bias.to(q.dtype).expand(*group, *bias.shape[-3:]).reshape(-1, *bias.shape[-3:])
    q, k, v = (head.transpose(-1, -2) for head in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(-1, -2)


@functools.lru_cache(maxsize=64)
def _position_index(window: Extents, full: Extents, legacy: bool, device: torch.device) -> Tensor:
    """Return the row of the position table for each pair of cells, ``(N, N)``."""
    num_cells = window[0] * window[1] * window[2]
    extents = full if legacy else window
    axes = [torch.arange(extent, device=device) for extent in extents]
    cells = torch.cartesian_prod(*axes).view(-1, 3)
    offset = cells[:, None] - cells[None, :] + torch.tensor(full, device=device) - 1
    rows, columns = 2 * full[1] - 1, 2 * full[2] - 1
    index = (offset[..., 0] * rows + offset[..., 1]) * columns + offset[..., 2]
    return index[:num_cells, :num_cells].contiguous()


def _init_linear(linear: nn.Linear) -> None:
    nn.init.trunc_normal_(linear.weight, std=INIT_STD)
    nn.init.zeros_(linear.bias)


class SwinBlock(nn.Module):
    """Transformer block over windows: queries from one stream, keys and values from another.

    ``CB(q, k) = r + MLP(LN2(r))`` with ``r = q + Attn(LN1(q), LNk(k))``; both branches may be
    dropped. Cells that fill the last windows are zero after the norms and take part in the
    attention as zero tokens, as published.

    Args:
        dim: Channels.
        num_heads: Number of heads.
        window: Extents of a window in depth, latitude and longitude.
        cross: False for self-attention, which has no separate key stream.
        mlp_ratio: Hidden channels of the MLP over ``dim``.
        drop_path: Rate at which a branch is dropped.
        legacy_clip: See `WindowAttention`.
        recompute: Recompute each of the two branches in the backward pass instead of storing it.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: Extents,
        *,
        cross: bool = True,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        legacy_clip: bool = False,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, **options)
        self.norm_key = nn.LayerNorm(dim, **options) if cross else None
        self.attn = WindowAttention(dim, num_heads, window, legacy_clip=legacy_clip, **options)
        self.norm2 = nn.LayerNorm(dim, **options)
        hidden_dim = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden_dim, **options),
            nn.GELU(),
            nn.Linear(hidden_dim, dim, **options),
        )
        self._reset_mlp()
        self.drop_path = DropPath(drop_path)

    def reset_parameters(self) -> None:
        """Draw weights and position bias from a truncated normal; biases start at 0, norms at 1."""
        for norm in (self.norm1, self.norm_key, self.norm2):
            if norm is not None:
                norm.reset_parameters()
        self.attn.reset_parameters()
        self._reset_mlp()

    def forward(self, query: Tensor, key: Tensor | None, layout: WindowLayout) -> Tensor:
        """Return ``CB(query, key)``; windows ``(B, num_windows, N, C)`` in and out."""
        return query + self.update(query, key, layout)

    def update(self, query: Tensor, key: Tensor | None, layout: WindowLayout) -> Tensor:
        """Return ``CB(query, key) - query``, what the block adds to its query.

        Raises:
            ValueError: A key is missing, or given to a block of self-attention.
        """
        if (key is None) != (self.norm_key is None):
            raise ValueError(
                "a cross block needs a key, a self block takes None; found "
                + ("no key" if key is None else "a key")
            )
        attended = self._branch(self._attend, query, key, layout)
        return attended + self._branch(self._transform, query + attended)

    def _reset_mlp(self) -> None:
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                _init_linear(layer)

    def _branch(self, function: Callable[..., Tensor], *inputs: object) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(function, *inputs, use_reentrant=False))
        return function(*inputs)

    def _attend(self, query: Tensor, key: Tensor | None, layout: WindowLayout) -> Tensor:
        normed = self.norm1(query)
        normed_key = None if key is None or self.norm_key is None else self.norm_key(key)
        inside = layout.inside(query.device)
        if inside is not None:
            normed = normed * inside
            normed_key = None if normed_key is None else normed_key * inside
        return cast(Tensor, self.drop_path(self.attn(normed, normed_key, layout)))

    def _transform(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.drop_path(self.mlp(self.norm2(x))))
