"""Triton kernels of ``block_sparse_attention``; same results as ``gather.py``.

One program computes one block of queries (or, for the gradients of keys and values, one block of
keys) and walks the list of its kept blocks, not a row of the mask.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from core_gates.ops.block_sparse_attention.reference import BlockLayout

LOG2E = 1.4426950408889634
SMALLEST = 16  # side of the smallest matrix that tl.dot takes
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _load(x, position, inside, dim, UPCAST: tl.constexpr, DIM: tl.constexpr):
    """Return the rows of ``x`` (L, D) at ``position``, zero outside."""
    d = tl.arange(0, DIM)
    where = inside[:, None] & (d < dim)[None, :]
    values = tl.load(x + position[:, None] * dim + d[None, :], where, other=0.0)
    return values.to(tl.float32) if UPCAST else values


@triton.jit
def _store(x, value, position, inside, dim, DIM: tl.constexpr):
    d = tl.arange(0, DIM)
    where = inside[:, None] & (d < dim)[None, :]
    tl.store(x + position[:, None] * dim + d[None, :], value, where)


@triton.jit
def _token(padding, key, inside, head, heads, num_keys):
    """Return which of the keys ``inside`` are not padding, all if there is no mask."""
    if padding is not None:
        ignored = tl.load(padding + head // heads * num_keys + key, inside, other=1)
        inside = inside & (ignored == 0)
    return inside


@triton.jit
def _visible(query, query_inside, key, key_inside, offset, CAUSAL: tl.constexpr):
    """Return which keys (columns) the queries (rows) see."""
    seen = query_inside[:, None] & key_inside[None, :]
    if CAUSAL:
        seen = seen & (key[None, :] <= query[:, None] + offset)
    return seen


@triton.jit
def _forward_kernel(
    q, k, v, lists, counts, padding, out, lse,
    num_queries, num_keys, dim, rows, columns, heads, group, offset, lead, scale,
    CAUSAL: tl.constexpr, UPCAST: tl.constexpr,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Write output and log-sum-exp of one block of queries; ``scale`` includes log2(e)."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    r = tl.arange(0, BLOCK)
    query = row * SIZE + r - lead
    inside = (r < SIZE) & (query >= 0) & (query < num_queries)
    q += head * num_queries * dim
    k += head // group * num_keys * dim
    v += head // group * num_keys * dim
    left = _load(q, query, inside, dim, UPCAST, DIM)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    value = tl.zeros((BLOCK, DIM), tl.float32)
    for n in range(0, tl.load(counts + head * rows + row)):
        block = tl.load(lists + (head * rows + row) * columns + n).to(tl.int64)
        key = block * SIZE + r
        key_inside = (r < SIZE) & (key < num_keys)
        key_inside = _token(padding, key, key_inside, head, heads, num_keys)
        right = _load(k, key, key_inside, dim, UPCAST, DIM)
        score = tl.dot(left, tl.trans(right), input_precision="ieee") * scale
        seen = _visible(query, inside, key, key_inside, offset, CAUSAL)
        score = tl.where(seen, score, float("-inf"))
        new = tl.maximum(top, tl.max(score, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        weight = tl.exp2(score - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weight, 1)
        right = _load(v, key, key_inside, dim, UPCAST, DIM)
        part = tl.dot(weight.to(right.dtype), right, input_precision="ieee")
        value = value * shrink[:, None] + part
        top = new
    seen_any = total > 0
    value = value / tl.where(seen_any, total, 1.0)[:, None]
    _store(out + head * num_queries * dim, value, query, inside, dim, DIM)
    sums = (top + tl.log2(tl.where(seen_any, total, 1.0))) * 0.6931471805599453
    tl.store(lse + head * num_queries + query, sums, inside)


@triton.jit
def _slopes(
    left, right, outer, value, lse, inner, seen, scale
):  # fmt: skip
    """Return the weights of queries (rows) over keys and the gradients of their scores."""
    score = tl.dot(left, tl.trans(right), input_precision="ieee") * scale
    weight = tl.where(seen, tl.exp2(score - lse[:, None]), 0.0)
    slope = tl.dot(outer, tl.trans(value), input_precision="ieee")
    return weight, weight * (slope - inner[:, None])


@triton.jit
def _query_gradient_kernel(
    grad, q, k, v, lse, inner, lists, counts, padding, grad_q,
    num_queries, num_keys, dim, rows, columns, heads, group, offset, lead, scale,
    CAUSAL: tl.constexpr, UPCAST: tl.constexpr,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one block of queries, up to the scale."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    r = tl.arange(0, BLOCK)
    query = row * SIZE + r - lead
    inside = (r < SIZE) & (query >= 0) & (query < num_queries)
    k += head // group * num_keys * dim
    v += head // group * num_keys * dim
    left = _load(q + head * num_queries * dim, query, inside, dim, UPCAST, DIM)
    outer = _load(grad + head * num_queries * dim, query, inside, dim, UPCAST, DIM)
    sums = tl.load(lse + head * num_queries + query, inside, other=0.0) * 1.4426950408889634
    dot = tl.load(inner + head * num_queries + query, inside, other=0.0)
    total = tl.zeros((BLOCK, DIM), tl.float32)
    for n in range(0, tl.load(counts + head * rows + row)):
        block = tl.load(lists + (head * rows + row) * columns + n).to(tl.int64)
        key = block * SIZE + r
        key_inside = (r < SIZE) & (key < num_keys)
        key_inside = _token(padding, key, key_inside, head, heads, num_keys)
        right = _load(k, key, key_inside, dim, UPCAST, DIM)
        value = _load(v, key, key_inside, dim, UPCAST, DIM)
        seen = _visible(query, inside, key, key_inside, offset, CAUSAL)
        _, slope = _slopes(left, right, outer, value, sums, dot, seen, scale)
        total += tl.dot(slope.to(right.dtype), right, input_precision="ieee")
    total *= scale * 0.6931471805599453
    _store(grad_q + head * num_queries * dim, total, query, inside, dim, DIM)


@triton.jit
def _key_gradient_kernel(
    grad, q, k, v, lse, inner, lists, counts, padding, grad_k, grad_v,
    num_queries, num_keys, dim, rows, columns, heads, group, offset, lead, scale,
    CAUSAL: tl.constexpr, UPCAST: tl.constexpr,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one block of keys and values over all heads of its group.

    Here ``rows`` counts blocks of keys and ``columns`` blocks of queries.
    """
    row, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    r = tl.arange(0, BLOCK)
    key = row * SIZE + r
    exists = (r < SIZE) & (key < num_keys)
    key_inside = _token(padding, key, exists, kv_head, heads, num_keys)
    right = _load(k + kv_head * num_keys * dim, key, key_inside, dim, UPCAST, DIM)
    value = _load(v + kv_head * num_keys * dim, key, key_inside, dim, UPCAST, DIM)
    total_k = tl.zeros((BLOCK, DIM), tl.float32)
    total_v = tl.zeros((BLOCK, DIM), tl.float32)
    for member in range(0, group):
        head = kv_head * group + member
        for n in range(0, tl.load(counts + head * rows + row)):
            block = tl.load(lists + (head * rows + row) * columns + n).to(tl.int64)
            query = block * SIZE + r - lead
            inside = (r < SIZE) & (query >= 0) & (query < num_queries)
            left = _load(q + head * num_queries * dim, query, inside, dim, UPCAST, DIM)
            outer = _load(grad + head * num_queries * dim, query, inside, dim, UPCAST, DIM)
            sums = tl.load(lse + head * num_queries + query, inside, other=0.0)
            dot = tl.load(inner + head * num_queries + query, inside, other=0.0)
            seen = _visible(query, inside, key, key_inside, offset, CAUSAL)
            weight, slope = _slopes(
                left, right, outer, value, sums * 1.4426950408889634, dot, seen, scale
            )  # fmt: skip
            total_v += tl.dot(tl.trans(weight).to(outer.dtype), outer, input_precision="ieee")
            total_k += tl.dot(tl.trans(slope).to(left.dtype), left, input_precision="ieee")
    total_k *= scale * 0.6931471805599453
    _store(grad_k + kv_head * num_keys * dim, total_k, key, exists, dim, DIM)
    _store(grad_v + kv_head * num_keys * dim, total_v, key, exists, dim, DIM)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    block_size: int,
    causal: bool,
    scale: float,
    padding_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the output (B, H, Lq, D) and its log-sum-exp (B, H, Lq) in float32."""
    layout = BlockLayout(block_size, q.shape[2], k.shape[2], causal)
    kept = block_mask & layout.reachable(q.device)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    q, k, v = (t.contiguous() for t in (q, k, v))
    tensors = (q, k, v, *_lists(kept), _bytes(padding_mask), out, lse)
    _launch(_forward_kernel, tensors, kept, q, k, layout, scale)
    return out, lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    out: Tensor,
    lse: Tensor,
    block_size: int,
    causal: bool,
    scale: float,
    padding_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    layout = BlockLayout(block_size, q.shape[2], k.shape[2], causal)
    kept = block_mask & layout.reachable(q.device)
    grad, q, k, v = (t.contiguous() for t in (grad, q, k, v))
    inner = (grad.float() * out.float()).sum(-1)
    grad_q, grad_k, grad_v = (
        torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v)
    )
    saved = (grad, q, k, v, lse, inner)
    tensors = (*saved, *_lists(kept), _bytes(padding_mask), grad_q)
    _launch(_query_gradient_kernel, tensors, kept, q, k, layout, scale)
    kept = kept.mT
    tensors = (*saved, *_lists(kept), _bytes(padding_mask), grad_k, grad_v)
    _launch(_key_gradient_kernel, tensors, kept, q, k, layout, scale)
    return grad_q, grad_k, grad_v


def _lists(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each row the kept columns first, and their number; nothing waits for the host."""
    order = (~kept).to(torch.uint8).argsort(dim=-1, stable=True)
    return order.to(torch.int32).contiguous(), kept.sum(-1, dtype=torch.int32).contiguous()


def _bytes(padding_mask: Tensor | None) -> Tensor | None:
    return None if padding_mask is None else padding_mask.to(torch.uint8).contiguous()


def _launch(kernel, tensors, kept, q, k, layout, scale):
    """Run one program for each row of ``kept`` and each head of the tensor that has those rows."""
    group = q.shape[1] // k.shape[1]
    heads = (k if kernel is _key_gradient_kernel else q).shape[1]
    rows, columns = kept.shape[-2:]
    if not rows or not heads or not len(q):
        return
    block = max(SMALLEST, triton.next_power_of_2(layout.size))
    with torch.cuda.device_of(q):
        kernel[(rows, len(q) * heads)](
            *tensors, layout.num_queries, layout.num_keys, q.shape[-1], rows, columns, heads, group,
            layout.offset, layout.lead, scale * LOG2E,
            CAUSAL=layout.causal, UPCAST=_INTERPRETED and q.dtype != torch.float32,
            SIZE=layout.size, BLOCK=block,
            DIM=max(SMALLEST, triton.next_power_of_2(q.shape[-1])),
        )  # fmt: skip
