"""Definition of ``block_sparse_attention``, differentiable, and how queries and keys are cut."""

from typing import NamedTuple

import torch
from torch import Tensor

from core_gates.numerics import accumulation_dtype


class BlockLayout(NamedTuple):
    """Blocks of ``size`` tokens, cut at multiples of ``size`` for queries and keys alike.

    Under causality the queries are the last tokens of the keys, so that the first block of
    queries may begin in the middle: it has ``lead`` tokens that are not queries.

    Attributes:
        size: Tokens of a block.
        num_queries: Number of queries.
        num_keys: Number of keys.
        causal: Whether a query sees no key that comes after it.
    """

    size: int
    num_queries: int
    num_keys: int
    causal: bool

    @property
    def offset(self) -> int:
        """Position of the first query."""
        return self.num_keys - self.num_queries if self.causal else 0

    @property
    def lead(self) -> int:
        """Tokens before the first query in its block."""
        return self.offset % self.size

    @property
    def first(self) -> int:
        """Block of keys at the position of the first block of queries."""
        return self.offset // self.size

    @property
    def num_query_blocks(self) -> int:
        """Number of blocks that hold a query."""
        return -(-(self.lead + self.num_queries) // self.size) if self.num_queries else 0

    @property
    def num_key_blocks(self) -> int:
        """Number of blocks that hold a key."""
        return -(-self.num_keys // self.size)

    @property
    def is_short(self) -> bool:
        """Whether the queries fit into one block, as in decoding."""
        return self.num_queries <= self.size

    def reachable(self, device: torch.device) -> Tensor:
        """Return the pairs of blocks with a visible pair of positions, bool (Nq, Nk)."""
        shape = (self.num_query_blocks, self.num_key_blocks)
        everything = torch.ones(shape, dtype=torch.bool, device=device)
        return everything.tril(self.first) if self.causal else everything

    def visible(self, device: torch.device) -> Tensor:
        """Return the visible pairs of positions, bool (Lq, Lk)."""
        shape = (self.num_queries, self.num_keys)
        everything = torch.ones(shape, dtype=torch.bool, device=device)
        return everything.tril(self.offset) if self.causal else everything

    def edge_blocks(self) -> int | None:
        """Shift from row to its partly visible block: -1 for the last block, None for none.

        The edge is the one block of a row in which some pairs of positions are invisible; None if
        all blocks are whole.
        """
        if self.causal:
            return self.first
        return -1 if self.num_keys % self.size else None

    def edge_bias(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the scores to add in an edge block, 0 or -inf, (size, size)."""
        bias = torch.full((self.size, self.size), -torch.inf, dtype=dtype, device=device)
        if self.causal:
            return bias.triu(1)
        bias[:, : self.num_keys % self.size] = 0
        return bias


def without_padding(x: Tensor, padding_mask: Tensor) -> Tensor:
    """Return (B, heads, L, D) with zeros where ``padding_mask`` (B, L) is True."""
    return x.masked_fill(padding_mask[:, None, :, None], 0)


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
    """Compute masked attention densely: output (B, H, Lq, D) and its log-sum-exp.

    A query without a visible key has output 0 and log-sum-exp -inf. Keys at padding, True in
    ``padding_mask`` (B, Lk), are visible to none.
    """
    if padding_mask is not None:
        k, v = (without_padding(t, padding_mask) for t in (k, v))
    layout = BlockLayout(block_size, q.shape[2], k.shape[2], causal)
    acc = accumulation_dtype(q)
    group = q.shape[1] // k.shape[1]
    key, value = (t.to(acc).repeat_interleave(group, 1) for t in (k, v))
    rows = torch.arange(layout.lead, layout.lead + layout.num_queries, device=q.device)
    columns = torch.arange(layout.num_keys, device=q.device)
    kept = block_mask[..., rows // block_size, :][..., columns // block_size]
    hidden = ~(kept & layout.visible(q.device))
    if padding_mask is not None:
        hidden = hidden | padding_mask[:, None, None, :]
    scores = (q.to(acc) @ key.mT * scale).masked_fill(hidden, -torch.inf)
    empty = hidden.all(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
    lse = scores.masked_fill(empty, 0).logsumexp(-1).masked_fill(empty[..., 0], -torch.inf)
    return (weights @ value).to(q.dtype), lse
