"""``block_sparse_attention`` of few queries, as in decoding: the rows of the kept keys are picked.

A step of decoding reads a long cache once, so that a copy of it would cost more than attention. The
kept rows are read where they lie, a part at a time that stays in the cache of the processor, once
for all query heads of a key head.
"""

from itertools import product

import torch
from torch import Tensor

from core_gates.numerics import accumulation_dtype
from core_gates.ops.block_sparse_attention.reference import BlockLayout

PICKED = 2**18  # numbers picked at once: 1 MiB of float32


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    block_size: int,
    causal: bool,
    scale: float,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """Return the output (B, H, Lq, D); see `reference.forward`."""
    layout = BlockLayout(block_size, q.shape[2], k.shape[2], causal)
    batch, num_kv_heads, length, dim = k.shape
    group = q.shape[1] // num_kv_heads
    queries = (q.to(accumulation_dtype(q)) * scale).reshape(
        batch, num_kv_heads, group * layout.num_queries, dim
    )
    kept = block_mask.reshape(batch, num_kv_heads, group, *block_mask.shape[2:])
    chosen = kept.flatten(2, 3).any(2)
    inside = torch.arange(block_size, device=q.device)
    query = torch.arange(layout.num_queries, device=q.device)
    blocks, last = (layout.lead + query) // block_size, layout.offset + query.unsqueeze(-1)
    out = torch.empty_like(queries)
    for pair in product(range(batch), range(num_kv_heads)):
        row = (chosen[pair].nonzero() * block_size + inside).flatten()
        row = row[: int((row < length).sum())]
        if padding_mask is not None:
            row = row[~padding_mask[pair[0]][row]]
        seen = kept[pair][:, blocks][..., row // block_size]
        if causal and layout.num_queries > 1:
            seen = seen & (row <= last)
        out[pair] = _attend(queries[pair], k[pair], v[pair], row, ~seen.flatten(0, 1))
    return out.view(q.shape).to(q.dtype)


def _attend(query: Tensor, key: Tensor, value: Tensor, row: Tensor, hidden: Tensor) -> Tensor:
    """Return what queries (m, D) take from the rows n of keys and values (L, D), hidden (m, n)."""
    size = max(1, PICKED // key.shape[1])
    parts = torch.split(row, size)
    space = key.new_empty(min(size, len(row)), key.shape[1])
    scores, out = query.new_empty(hidden.shape), torch.zeros_like(query)

    def picked(x: Tensor, part: Tensor) -> Tensor:
        return torch.index_select(x, 0, part, out=space[: len(part)]).to(query.dtype)

    for part, score in zip(parts, torch.split(scores, size, 1), strict=True):
        torch.mm(query, picked(key, part).T, out=score)
    scores.masked_fill_(hidden, torch.finfo(scores.dtype).min)  # finite: there may be nothing else
    weights = torch.softmax(scores, -1, out=scores).masked_fill_(hidden, 0)
    for part, weight in zip(parts, torch.split(weights, size, 1), strict=True):
        out.addmm_(weight, picked(value, part))
    return out
