"""Triton kernels of ``grouped_linear``; same results as ``segments.py``."""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from core_gates.activations import activation_gradient

ROWS, COLUMNS, DEPTH = 64, 64, 32  # of the tile of one program
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        z = tl.maximum(z, 0.0)
    elif ACTIVATION == "silu":
        z = z * tl.sigmoid(z)
    elif ACTIVATION == "gelu":
        z = 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        z = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    return z


@triton.jit
def _product(
    x, weight, source, row_inside, column, num_columns, depth,
    stride_column, stride_depth,
    UPCAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Return rows of x times columns of one weight, accumulated in float32."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, depth, DEPTH):
        d = start + tl.arange(0, DEPTH)
        left = tl.load(
            x + source[:, None] * depth + d[None, :],
            row_inside[:, None] & (d < depth)[None, :],
            other=0.0,
        )
        right = tl.load(
            weight + d[:, None] * stride_depth + column[None, :] * stride_column,
            (d < depth)[:, None] & (column < num_columns)[None, :],
            other=0.0,
        )
        if UPCAST:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total += tl.dot(left, right, input_precision="ieee")
    return total


@triton.jit
def _linear_kernel(
    x, weight, bias, gather, scatter, tile_group, tile_start, tile_end, out, kept,
    num_groups, num_columns, depth, stride_group, stride_column, stride_depth,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, KEEP: tl.constexpr, BIAS: tl.constexpr,
    GATHER: tl.constexpr, SCATTER: tl.constexpr, UPCAST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Write one tile of the result; rows of no group (group ``num_groups``) get zeros."""
    tile = tl.program_id(0).to(tl.int64)
    group = tl.load(tile_group + tile)
    row = tl.load(tile_start + tile) + tl.arange(0, ROWS)
    end = tl.load(tile_end + tile)
    inside = row < end
    routed = row < tl.where(group < num_groups, end, 0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    width = num_columns * 2 if GATED else num_columns
    source = tl.load(gather + row, routed, other=0) if GATHER else row
    target = tl.load(scatter + row, inside, other=0) if SCATTER else row
    group = tl.minimum(group, num_groups - 1)
    weight += group * stride_group
    z = _product(
        x, weight, source, routed, column, num_columns, depth, stride_column, stride_depth,
        UPCAST, ROWS, COLUMNS, DEPTH,
    )  # fmt: skip
    valid = column < num_columns
    stored = inside[:, None] & valid[None, :]
    if BIAS:
        added = tl.load(bias + group * width + column, valid, other=0.0).to(tl.float32)
        z += tl.where(routed[:, None], added[None, :], 0.0)
    if KEEP:
        tl.store(kept + row[:, None] * width + column[None, :], z, stored)
    value = _activate(z, ACTIVATION)
    if GATED:
        up = _product(
            x, weight + num_columns * stride_column, source, routed, column, num_columns, depth,
            stride_column, stride_depth, UPCAST, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        if BIAS:
            added = tl.load(bias + group * width + num_columns + column, valid, other=0.0)
            up += tl.where(routed[:, None], added.to(tl.float32)[None, :], 0.0)
        if KEEP:
            tl.store(kept + row[:, None] * width + num_columns + column[None, :], up, stored)
        value *= up
    tl.store(out + target[:, None] * num_columns + column[None, :], value, stored)


@triton.jit
def _weight_gradient_kernel(
    outer, x, gather, starts, ends, out, width, depth,
    GATHER: tl.constexpr, UPCAST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Write one tile of ``outer.T @ x`` over the rows of one group."""
    group = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    d = tl.program_id(2) * DEPTH + tl.arange(0, DEPTH)
    end = tl.load(ends + group)
    total = tl.zeros((COLUMNS, DEPTH), tl.float32)
    for start in range(tl.load(starts + group), end, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = row < end
        source = tl.load(gather + row, inside, other=0) if GATHER else row
        left = tl.load(
            outer + row[None, :] * width + column[:, None],
            (column < width)[:, None] & inside[None, :],
            other=0.0,
        )
        right = tl.load(
            x + source[:, None] * depth + d[None, :],
            inside[:, None] & (d < depth)[None, :],
            other=0.0,
        )
        if UPCAST:
            left, right = left.to(tl.float32), right.to(tl.float32)
        total += tl.dot(left, right, input_precision="ieee")
    place = group * width * depth + column[:, None] * depth + d[None, :]
    tl.store(out + place, total, (column < width)[:, None] & (d < depth)[None, :])


def forward(
    x: Tensor,
    weight: Tensor,
    counts: Tensor,
    bias: Tensor | None,
    gather: Tensor | None,
    scatter: Tensor | None,
    activation: str,
    gated: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Return the result, and the values before the activation if they are to be kept."""
    num_rows = x.shape[0] if gather is None else gather.shape[0]
    width = weight.shape[1]
    keep = keep and (gated or activation != "identity")
    out = torch.empty((num_rows, width // 2 if gated else width), dtype=x.dtype, device=x.device)
    kept = torch.empty((num_rows if keep else 0, width), dtype=x.dtype, device=x.device)
    _launch(x, weight, counts, bias, gather, scatter, activation, gated, out, kept)
    return out, kept


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    counts: Tensor,
    gather: Tensor | None,
    scatter: Tensor | None,
    kept: Tensor,
    activation: str,
    gated: bool,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias; empty where they are not needed."""
    outer = (grad if scatter is None else grad.index_select(0, scatter)).contiguous()
    if activation != "identity" or gated:
        outer = activation_gradient(outer, kept, activation, gated)
    grad_x, grad_weight = x.new_empty(0), weight.new_empty(0)
    grad_bias = weight.new_zeros(weight.shape[:2] if needs_bias else (0,))
    if needs_x:
        grad_x = torch.empty((outer.shape[0], x.shape[1]), dtype=x.dtype, device=x.device)
        no_values = x.new_empty(0)
        _launch(outer, weight.mT, counts, None, None, None, "identity", False, grad_x, no_values)
        if gather is not None:
            zeros = torch.zeros_like(x, memory_format=torch.contiguous_format)
            grad_x = zeros.index_add_(0, gather, grad_x)
    if needs_weight:
        grad_weight = _weight_gradient(outer, x, counts, gather, weight)
    if needs_bias:
        group = torch.repeat_interleave(counts)
        grad_bias.index_add_(0, group, outer[: group.shape[0]])
    return grad_x, grad_weight, grad_bias


def _launch(
    x: Tensor,
    weight: Tensor,
    counts: Tensor,
    bias: Tensor | None,
    gather: Tensor | None,
    scatter: Tensor | None,
    activation: str,
    gated: bool,
    out: Tensor,
    kept: Tensor,
) -> None:
    num_rows, num_columns = out.shape
    if out.numel() == 0:
        return
    x = x.contiguous()
    tiles = _tiles(counts, num_rows)
    nothing = tiles[0]  # any pointer, for arguments that are not read
    grid = (tiles[0].shape[0], triton.cdiv(num_columns, COLUMNS))
    with torch.cuda.device_of(x):
        _linear_kernel[grid](
            x, weight, nothing if bias is None else bias.contiguous(),
            nothing if gather is None else gather.contiguous(),
            nothing if scatter is None else scatter.contiguous(), *tiles, out, kept,
            weight.shape[0], num_columns, x.shape[1], *weight.stride(),
            ACTIVATION=activation, GATED=gated, KEEP=kept.numel() > 0, BIAS=bias is not None,
            GATHER=gather is not None, SCATTER=scatter is not None,
            UPCAST=_INTERPRETED and x.dtype == torch.bfloat16,
            ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=DEPTH,
        )  # fmt: skip


def _weight_gradient(
    outer: Tensor, x: Tensor, counts: Tensor, gather: Tensor | None, weight: Tensor
) -> Tensor:
    out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    num_groups, width, depth = out.shape
    if out.numel() == 0:
        return out
    ends = counts.cumsum(0)
    grid = (num_groups, triton.cdiv(width, COLUMNS), triton.cdiv(depth, DEPTH))
    with torch.cuda.device_of(x):
        _weight_gradient_kernel[grid](
            outer, x.contiguous(), ends if gather is None else gather.contiguous(),
            ends - counts, ends, out, width, depth, GATHER=gather is not None,
            UPCAST=_INTERPRETED and x.dtype == torch.bfloat16,
            ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=DEPTH,
        )  # fmt: skip
    return out


def _tiles(counts: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return group, first row and end of the rows of every row tile, without a wait.

    The rows of no group form their own last group. There are at least as many tiles as
    needed; those too many are empty.
    """
    rest = num_rows - counts.sum(0, keepdim=True)
    sizes = torch.cat([counts, rest])
    ends = sizes.cumsum(0)
    last_tile = ((sizes + ROWS - 1) // ROWS).cumsum(0)
    tile = torch.arange(num_rows // ROWS + sizes.shape[0], device=counts.device)
    group = torch.searchsorted(last_tile, tile, right=True)
    owner = group.clamp(max=sizes.shape[0] - 1)
    before = last_tile - (sizes + ROWS - 1) // ROWS
    start = (ends - sizes)[owner] + (tile - before[owner]) * ROWS
    return owner, start, torch.where(group == owner, ends[owner], 0)
