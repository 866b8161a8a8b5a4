"""Windowed self-attention over volumes of tokens (Swin), with its layout and drop path."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from core_gates.attention.head_gate import INIT_STD
from core_gates.errors import check_fraction


class DropPath(nn.Module):
    """Drop the branch of whole samples while training (Huang et al., 2016, stochastic depth).

    Kept branches are scaled by ``1 / (1 - rate)``, so that the expectation is unchanged.

    Args:
        rate: Probability that a sample loses the branch.

    Shape:
        ``x`` (B, ...) to the same shape.

    Raises:
        ValueError: ``rate`` lies outside [0, 1).
    """

    def __init__(self, rate: float = 0.0) -> None:
        check_fraction(rate=rate)
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``, or while training ``x`` with dropped samples set to zero."""
        if self.rate == 0 or not self.training:
            return x
        keep = 1 - self.rate
        return x * x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        """Show the rate."""
        return f"rate={self.rate}"


MASKED = -100.0
"""Added to the attention logit of two cells that only the cyclic shift made neighbors."""

Extents = tuple[int, int, int]
"""Depth (level), latitude row, longitude column."""


@dataclass(frozen=True)
class WindowLayout:
    """Windows of a grid (D, H, W) of depth, latitude and longitude.

    The grid is padded with zeros after its last level, row and column to whole windows, then
    rolled back by ``shift`` cells. Windows count in depth, latitude, longitude order, and so do the
    cells of a window.

    Attributes:
        size: Extents of the grid.
        window: Extents of a window, none larger than the grid's.
        shift: Cells by which the windows are displaced.
    """

    size: Extents
    window: Extents
    shift: Extents

    @classmethod
    def of(cls, size: Extents, window: Extents, *, shifted: bool = False) -> WindowLayout:
        """Clip the window to the grid and shift it by half its extents.

        A dimension that is not larger than the window is covered by one window without a shift.
        """
        clipped = [min(s, w) for s, w in zip(size, window, strict=True)]
        shift = [w // 2 if shifted and s > w else 0 for s, w in zip(size, window, strict=True)]
        return cls(tuple(size), tuple(clipped), tuple(shift))  # type: ignore[arg-type]

    @property
    def counts(self) -> Extents:
        """Number of windows in each dimension."""
        depth, rows, columns = (
            math.ceil(s / w) for s, w in zip(self.size, self.window, strict=True)
        )
        return depth, rows, columns

    @property
    def padding(self) -> Extents:
        """Cells appended to each dimension."""
        depth, rows, columns = (
            n * w - s for n, w, s in zip(self.counts, self.window, self.size, strict=True)
        )
        return depth, rows, columns

    def partition(self, x: Tensor) -> Tensor:
        """Cut ``(B, C, D, H, W)`` of any strides into windows ``(B, num_windows, N, C)``."""
        x = x.movedim(1, -1)
        if any(self.padding):
            depth, rows, columns = self.padding
            x = F.pad(x, (0, 0, 0, columns, 0, rows, 0, depth))
        x = _roll(x, self.shift, sign=-1)
        (nd, nh, nw), (d, h, w) = self.counts, self.window
        x = x.reshape(x.shape[0], nd, d, nh, h, nw, w, x.shape[-1])
        windows = x.permute(0, 1, 3, 5, 2, 4, 6, 7)
        return windows.reshape(x.shape[0], nd * nh * nw, d * h * w, x.shape[-1])

    def reverse(self, windows: Tensor) -> Tensor:
        """Undo `partition`; the result ``(B, C, D, H, W)`` has channels-last strides."""
        (nd, nh, nw), (d, h, w) = self.counts, self.window
        x = windows.reshape(windows.shape[0], nd, nh, nw, d, h, w, windows.shape[-1])
        x = x.permute(0, 1, 4, 2, 5, 3, 6, 7)
        x = x.reshape(x.shape[0], nd * d, nh * h, nw * w, x.shape[-1])
        x = _roll(x, self.shift, sign=1)
        if any(self.padding):
            x = x[:, : self.size[0], : self.size[1], : self.size[2]]
        return x.movedim(-1, 1)

    def inside(self, device: torch.device) -> Tensor | None:
        """Return ``(num_windows, N, 1)`` booleans, False in padding; None if nothing is padded."""
        return shape_constant(_inside, self, device) if any(self.padding) else None

    def mask(self, device: torch.device) -> Tensor | None:
        """Return the mask added to attention logits, ``(depth * latitude windows, N, N)``.

        Cells that the roll brought together across the top and bottom or the two poles get
        `MASKED`. Longitude is periodic, therefore never masked and without an axis here; None if
        only longitude, or nothing, is shifted.
        """
        return shape_constant(_mask, self, device) if any(self.shift[:2]) else None


def _roll(x: Tensor, shift: Extents, *, sign: int) -> Tensor:
    dims = [dim for dim, step in enumerate(shift) if step]
    return x.roll([sign * shift[dim] for dim in dims], [dim + 1 for dim in dims]) if dims else x


def shape_constant(make: functools._lru_cache_wrapper[Tensor], *key: object) -> Tensor:
    """Take a constant from its cache; a traced program computes it, so that it stays a program."""
    if torch.compiler.is_compiling():
        return cast(Tensor, make.__wrapped__(*key))
    with torch.inference_mode(False):
        return make(*key)


@functools.lru_cache(maxsize=64)
def _inside(layout: WindowLayout, device: torch.device) -> Tensor:
    return layout.partition(torch.ones(1, 1, *layout.size, device=device))[0] > 0


@functools.lru_cache(maxsize=64)
def _mask(layout: WindowLayout, device: torch.device) -> Tensor:
    (nd, nh, _), (d, h, w) = layout.counts, layout.window
    depth = _regions(nd * d, d, layout.shift[0], device).view(nd, 1, d, 1)
    rows = _regions(nh * h, h, layout.shift[1], device).view(1, nh, 1, h)
    region = (3 * depth + rows).view(nd * nh, d * h).repeat_interleave(w, dim=1)
    return (region[:, :, None] != region[:, None, :]) * MASKED


def _regions(extent: int, window: int, shift: int, device: torch.device) -> Tensor:
    position = torch.arange(extent, device=device)
    if not shift:
        return torch.zeros_like(position)
    return (position >= extent - window).long() + (position >= extent - shift).long()


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


class WindowBlocks(nn.ModuleList):
    """Blocks of self-attention within windows; every second one has its windows shifted.

    Args:
        dim: Features d of a token.
        num_heads: Attention heads.
        window: Extents of a window in depth, latitude, longitude.
        depth: Number of blocks.
        drop_path: Rate of stochastic depth of the last block, to which it grows linearly from 0.
        options: Of every block, see `core_gates.attention.SwinBlock`.

    Shape:
        (B, d, D, H, W) to the same, channels-last strides.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: tuple[int, int, int],
        depth: int,
        *,
        drop_path: float = 0.0,
        **options: Any,
    ) -> None:
        rates = [drop_path * index / max(depth - 1, 1) for index in range(depth)]
        super().__init__(
            SwinBlock(dim, num_heads, window, cross=False, drop_path=rate, **options)
            for rate in rates
        )
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens after all blocks."""
        size = (x.shape[2], x.shape[3], x.shape[4])
        for index, block in enumerate(self):
            layout = WindowLayout.of(size, self.window, shifted=bool(index % 2))
            x = layout.reverse(block(layout.partition(x), None, layout))
        return x
