"""``block_sparse_attention`` by matmuls over gathered blocks.

Blocks of queries that keep equally many blocks of keys form a group; their keys and values are
gathered, and a few members of a group at a time, few enough that their scores stay in the cache, go
through two batched matmuls and a softmax. The backward pass recomputes the weights, so that
nothing but the inputs and the output is stored.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from core_gates.numerics import accumulation_dtype
from core_gates.ops.block_sparse_attention.reference import BlockLayout, without_padding

CPU_SCORES, GPU_SCORES = 2**17, 2**24  # scores at once: half of a 1 MiB cache on a CPU


class QueryGroup(NamedTuple):
    """Blocks of queries with equally many kept blocks, as many as are computed at once.

    Attributes:
        rows: Blocks of queries (m,) among all of B * H * Nq.
        blocks: Their kept blocks of keys (m * c,) among all of B * K * Nk.
        edge: Whether the last of the c blocks is an edge block.
    """

    rows: Tensor
    blocks: Tensor
    edge: bool


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
    queries, keys, values = _cut(q, k, v, layout, scale, padding_mask)
    out = torch.zeros_like(queries)
    space = _Workspace(queries, _padding(padding_mask, layout, k.shape[1]))
    edge = layout.edge_bias(queries.dtype, q.device)
    for group in groups(block_mask, layout, k.shape[1], space.limit):
        key, value = space.gather(keys, values, group)
        weights = space.weights(queries[group.rows], key, group, edge)
        out.index_copy_(0, group.rows, torch.bmm(weights, value))
    return _join(out, q, layout.lead)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    out: Tensor,
    block_size: int,
    causal: bool,
    scale: float,
    padding_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    layout = BlockLayout(block_size, q.shape[2], k.shape[2], causal)
    queries, keys, values = _cut(q, k, v, layout, scale, padding_mask)
    outer = _blocks(grad.to(queries.dtype), layout.size, layout.lead)
    inner = (outer * _blocks(out.to(queries.dtype), layout.size, layout.lead)).sum(-1, keepdim=True)
    grad_q, grad_k, grad_v = (torch.zeros_like(t) for t in (queries, keys, values))
    space = _Workspace(queries, _padding(padding_mask, layout, k.shape[1]))
    edge = layout.edge_bias(queries.dtype, q.device)
    for group in groups(block_mask, layout, k.shape[1], space.limit):
        key, value = space.gather(keys, values, group)
        query, grad_rows = queries[group.rows], outer[group.rows]
        weights = space.weights(query, key, group, edge)
        _add(grad_v, group.blocks, torch.bmm(weights.mT, grad_rows))
        slope = torch.bmm(grad_rows, value.mT).sub_(inner[group.rows]).mul_(weights)
        grad_q.index_copy_(0, group.rows, torch.bmm(slope, key))
        _add(grad_k, group.blocks, torch.bmm(slope.mT, query))
    return (
        _join(grad_q.mul_(scale), q, layout.lead),
        _join(grad_k, k, 0),
        _join(grad_v, v, 0),
    )


def groups(
    block_mask: Tensor, layout: BlockLayout, num_kv_heads: int, limit: int
) -> Iterator[QueryGroup]:
    """Sort the blocks of queries by their number of kept blocks and yield them in groups.

    Args:
        block_mask: Bool (B, H, Nq, Nk).
        layout: The cut.
        num_kv_heads: Number K of key heads.
        limit: Scores that a group may have, if it has more than one member.
    """
    num_heads, num_blocks = block_mask.shape[1], layout.num_key_blocks
    kept = (block_mask & layout.reachable(block_mask.device)).flatten(0, 2)
    counts, has_edge = kept.sum(-1), _has_edge(kept, layout)
    order = (2 * counts + has_edge).argsort(stable=True)
    place, block = kept[order].nonzero(as_tuple=True)
    head = order // max(layout.num_query_blocks, 1) // (num_heads // num_kv_heads)
    block = block + head[place] * num_blocks
    kinds, members = torch.unique_consecutive((2 * counts + has_edge)[order], return_counts=True)
    row = entry = 0
    for kind, size in zip(kinds.tolist(), members.tolist(), strict=True):
        count, edge = divmod(kind, 2)
        step = max(1, limit // max(1, count * layout.size**2))
        for start in range(0, size if count else 0, step):
            number = min(step, size - start)
            first = entry + start * count
            rows = order[row + start : row + start + number]
            yield QueryGroup(rows, block[first : first + number * count], bool(edge))
        row, entry = row + size, entry + size * count


def _has_edge(kept: Tensor, layout: BlockLayout) -> Tensor:
    edge = layout.edge_blocks()
    if edge is None or not kept.numel():
        return torch.zeros(len(kept), dtype=torch.bool, device=kept.device)
    if edge < 0:
        return kept[:, -1]
    row = torch.arange(len(kept), device=kept.device)
    return kept[row, row % layout.num_query_blocks + edge]


class _Workspace:
    """Memory for the gathered keys and values and the scores of a group, used again and again."""

    def __init__(self, queries: Tensor, padding: Tensor | None) -> None:
        self.padding = padding
        self.limit = CPU_SCORES if queries.device.type == "cpu" else GPU_SCORES
        self.parts = [queries.new_empty(0) for _ in range(3)]

    def gather(self, keys: Tensor, values: Tensor, group: QueryGroup) -> tuple[Tensor, Tensor]:
        """Return the kept keys and values, (m, c * size, D) each."""
        gathered = []
        for number, blocks in enumerate((keys, values)):
            flat = self._part(number, (len(group.blocks), blocks[0].numel()))
            torch.index_select(blocks.flatten(1), 0, group.blocks, out=flat)
            gathered.append(flat.view(len(group.rows), -1, blocks.shape[-1]))
        return gathered[0], gathered[1]

    def weights(self, query: Tensor, key: Tensor, group: QueryGroup, edge: Tensor) -> Tensor:
        """Return the softmax of the scores, (m, size, c * size)."""
        scores = self._part(2, (*query.shape[:2], key.shape[1]))
        torch.bmm(query, key.mT, out=scores)
        if group.edge:
            scores[..., -len(edge) :] += edge
        if self.padding is None:
            return torch.softmax(scores, -1, out=scores)
        ignored = self.padding[group.blocks].view(len(query), 1, -1)
        scores.masked_fill_(
            ignored, torch.finfo(scores.dtype).min
        )  # finite: it may be all there is
        return torch.softmax(scores, -1, out=scores).masked_fill_(ignored, 0)

    def _part(self, number: int, shape: tuple[int, ...]) -> Tensor:
        numel = torch.Size(shape).numel()
        if self.parts[number].numel() < numel:
            self.parts[number] = self.parts[number].new_empty(numel)
        return self.parts[number][:numel].view(shape)


def _cut(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    scale: float,
    padding_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulation_dtype(q)
    if padding_mask is not None:
        k, v = (without_padding(t, padding_mask) for t in (k, v))
    queries = _blocks(q.to(acc) * scale, layout.size, layout.lead)
    return queries, _blocks(k.to(acc), layout.size, 0), _blocks(v.to(acc), layout.size, 0)


def _padding(padding_mask: Tensor | None, layout: BlockLayout, num_kv_heads: int) -> Tensor | None:
    """Return where the blocks of keys (B * K * Nk, size) hold padding."""
    if padding_mask is None:
        return None
    tail = layout.num_key_blocks * layout.size - layout.num_keys
    blocks = F.pad(padding_mask, (0, tail)).view(-1, layout.num_key_blocks, layout.size)
    return blocks.repeat_interleave(num_kv_heads, 0).flatten(0, 1)


def _blocks(x: Tensor, size: int, lead: int) -> Tensor:
    """Return (B * H * N, size, D) with ``lead`` zeros before the positions and some after."""
    num_blocks = -(-(lead + x.shape[2]) // size) if x.shape[2] else 0
    tail = num_blocks * size - lead - x.shape[2] if num_blocks else 0
    if lead or tail:
        x = F.pad(x, (0, 0, lead if num_blocks else 0, tail))
    return x.reshape(x.shape[0] * x.shape[1] * num_blocks, size, x.shape[3])


def _join(blocks: Tensor, like: Tensor, lead: int) -> Tensor:
    """Return blocks as a tensor of the shape and dtype of ``like``."""
    batch, heads, length, dim = like.shape
    if not like.numel():
        return torch.zeros_like(like)
    joined = blocks.view(batch, heads, -1, dim)[:, :, lead : lead + length]
    return joined.to(like.dtype).contiguous()


def _add(total: Tensor, blocks: Tensor, part: Tensor) -> None:
    total.flatten(1).index_add_(0, blocks, part.view(len(blocks), -1))
