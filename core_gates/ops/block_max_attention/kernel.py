"""Triton kernel of ``block_max_attention``; same results as ``op.py``.

The weights are known only when the log-sum-exp of their row is, so that a second pass computes the
scores again; it costs half as much as the first and needs no memory for the scores.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

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
def _scores(left, right, query, inside, key, key_inside, scale):
    """Return scores in powers of two, -inf where the key is not visible."""
    score = tl.dot(left, tl.trans(right), input_precision="ieee") * scale
    seen = inside[:, None] & key_inside[None, :] & (key[None, :] <= query[:, None])
    return tl.where(seen, score, float("-inf"))


@triton.jit
def _forward_kernel(
    q, k, v, out, lse, maxima, length, dim, num_blocks, group, scale,
    PER_ROW: tl.constexpr, UPCAST: tl.constexpr,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Write output, log-sum-exp and maxima of one block of queries; ``scale`` includes log2(e)."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    r = tl.arange(0, BLOCK).to(tl.int64)
    query = row * SIZE + r
    inside = (r < SIZE) & (query < length)
    k += head // group * length * dim
    v += head // group * length * dim
    left = _load(q + head * length * dim, query, inside, dim, UPCAST, DIM)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    value = tl.zeros((BLOCK, DIM), tl.float32)
    for block in range(0, row + 1):
        key = block * SIZE + r
        key_inside = (r < SIZE) & (key < length)
        right = _load(k, key, key_inside, dim, UPCAST, DIM)
        score = _scores(left, right, query, inside, key, key_inside, scale)
        new = tl.maximum(top, tl.max(score, 1))
        base = tl.where(inside, new, 0.0)
        weight = tl.exp2(score - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weight, 1)
        right = _load(v, key, key_inside, dim, UPCAST, DIM)
        part = tl.dot(weight.to(right.dtype), right, input_precision="ieee")
        value = value * shrink[:, None] + part
        top = new
    total = tl.where(inside, total, 1.0)
    d = tl.arange(0, DIM)
    place = (head * length + query)[:, None] * dim + d[None, :]
    tl.store(out + place, value / total[:, None], inside[:, None] & (d < dim)[None, :])
    sums = tl.where(inside, top, 0.0) + tl.log2(total)
    tl.store(lse + head * length + query, sums * 0.6931471805599453, inside)
    for block in range(0, num_blocks):
        largest = tl.zeros((BLOCK,), tl.float32)
        if block <= row:
            key = block * SIZE + r
            key_inside = (r < SIZE) & (key < length)
            right = _load(k, key, key_inside, dim, UPCAST, DIM)
            score = _scores(left, right, query, inside, key, key_inside, scale)
            largest = tl.exp2(tl.max(score, 1) - sums)
        if PER_ROW:
            tl.store(maxima + (head * length + query) * num_blocks + block, largest, inside)
        else:
            entry = (head * num_blocks + row) * num_blocks + block
            tl.store(maxima + entry, tl.max(largest, 0))


def forward(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, scale: float, per_row: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, log-sum-exp and block maxima; see `reference.forward`."""
    batch, heads, length, dim = q.shape
    num_blocks = triton.cdiv(length, block_size)
    shape = (batch, heads, length if per_row else num_blocks, num_blocks)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    maxima = torch.empty(shape, dtype=torch.float32, device=q.device)
    q, k, v = (t.contiguous() for t in (q, k, v))
    if num_blocks and batch * heads:
        with torch.cuda.device_of(q):
            _forward_kernel[(num_blocks, batch * heads)](
                q, k, v, out, lse, maxima, length, dim, num_blocks, heads // k.shape[1],
                scale * LOG2E,
                PER_ROW=per_row, UPCAST=_INTERPRETED and q.dtype != torch.float32,
                SIZE=block_size, BLOCK=max(SMALLEST, triton.next_power_of_2(block_size)),
                DIM=max(SMALLEST, triton.next_power_of_2(dim)),
            )  # fmt: skip
    return out, lse, maxima
