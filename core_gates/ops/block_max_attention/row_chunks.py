"""``block_max_attention`` by a few blocks of queries at a time, against all keys before them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from core_gates.numerics import accumulation_dtype
from core_gates.ops.block_sparse_attention import gather

ROWS = 128  # queries at once: their scores leave the cache late, their matmuls are large


def forward(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, scale: float, per_row: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, log-sum-exp and block maxima; see `reference.forward`."""
    batch, heads, length, dim = q.shape
    acc = accumulation_dtype(q)
    num_blocks = -(-length // block_size)
    tail = num_blocks * block_size - length
    queries = (q.to(acc) * scale).reshape(batch * heads, length, dim)
    keys, values = (F.pad(t.to(acc), (0, 0, 0, tail)).flatten(0, 1) for t in (k, v))
    out, lse = torch.empty_like(queries), queries.new_empty(batch * heads, length)
    maxima = queries.new_zeros(batch * heads, length if per_row else num_blocks, num_blocks)
    rows = max(1, min(ROWS // block_size, num_blocks)) * block_size
    space = queries.new_empty(rows * num_blocks * block_size)
    future = queries.new_full((rows, rows), -torch.inf).triu(1)
    group = heads // k.shape[1]
    for head in range(batch * heads):
        key, value = keys[head // group], values[head // group]
        for start in range(0, length, rows):
            chunk = slice(start, min(start + rows, length))
            query = queries[head, chunk]
            blocks = -(-chunk.stop // block_size)
            seen = blocks * block_size
            scores = space[: len(query) * seen].view(len(query), seen)
            torch.mm(query, key[:seen].T, out=scores)
            scores[:, start:] += future[: len(query), : seen - start]
            top = scores.amax(-1)
            torch.softmax(scores, -1, out=scores)
            torch.mm(scores, value[:seen], out=out[head, chunk])
            by_row = scores.view(len(query), blocks, block_size).amax(-1)
            lse[head, chunk] = top - by_row.amax(-1).log()  # the largest weight is exp(top - lse)
            if per_row:
                maxima[head, chunk, :blocks] = by_row
            else:
                first = start // block_size
                for row, part in enumerate(torch.split(by_row, block_size), first):
                    maxima[head, row, :blocks] = part.amax(0)
    return (
        out.view(q.shape).to(q.dtype),
        lse.view(q.shape[:3]),
        maxima.view(batch, heads, *maxima.shape[1:]),
    )


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v through the output: those of plain causal attention."""
    blocks = -(-q.shape[2] // ROWS)
    everything = torch.ones(blocks, blocks, dtype=torch.bool, device=q.device)
    block_mask = everything.expand(*q.shape[:2], blocks, blocks)
    return gather.backward(grad, q, k, v, block_mask, out, ROWS, True, scale)
