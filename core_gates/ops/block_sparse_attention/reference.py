"""Definition of ``block_sparse_attention``; differentiable, any floating dtype."""

import torch
from torch import Tensor

from core_gates.numerics import accumulation_dtype
from core_gates.ops.block_sparse_attention.layout import BlockLayout


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: Tensor,
    block_size: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the output (B, H, Lq, D) in the dtype of ``q`` and log-sum-exp (B, H, Lq).

    A query without a visible key has output 0 and log-sum-exp -inf.
    """
    layout = BlockLayout(block_size, q.shape[2], k.shape[2], causal)
    acc = accumulation_dtype(q)
    group = q.shape[1] // k.shape[1]
    key, value = (t.to(acc).repeat_interleave(group, 1) for t in (k, v))
    rows = torch.arange(layout.lead, layout.lead + layout.num_queries, device=q.device)
    columns = torch.arange(layout.num_keys, device=q.device)
    kept = block_mask[..., rows // block_size, :][..., columns // block_size]
    hidden = ~(kept & layout.visible(q.device))
    scores = (q.to(acc) @ key.mT * scale).masked_fill(hidden, -torch.inf)
    empty = hidden.all(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
    lse = scores.masked_fill(empty, 0).logsumexp(-1).masked_fill(empty[..., 0], -torch.inf)
    return (weights @ value).to(q.dtype), lse
