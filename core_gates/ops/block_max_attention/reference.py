"""Definition of ``block_max_attention``; differentiable, any floating dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor

from core_gates.numerics import accumulation_dtype


def forward(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, scale: float, per_row: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return output (B, H, L, D), log-sum-exp (B, H, L) and block maxima.

    The maxima are (B, H, N, N), or (B, H, L, N) by row; both are float32 at least.
    """
    length, group = q.shape[2], q.shape[1] // k.shape[1]
    acc = accumulation_dtype(q)
    key, value = (t.to(acc).repeat_interleave(group, 1) for t in (k, v))
    hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    scores = (q.to(acc) @ key.mT * scale).masked_fill(hidden, -torch.inf)
    weights = scores.softmax(-1)
    tail = -length % block_size
    num_blocks = (length + tail) // block_size
    padded = F.pad(weights, (0, tail))
    maxima = padded.view(*padded.shape[:-1], num_blocks, block_size).amax(-1)
    if not per_row:
        padded = F.pad(maxima, (0, 0, 0, tail))
        maxima = padded.view(*q.shape[:2], num_blocks, block_size, num_blocks).amax(3)
    return (weights @ value).to(q.dtype), scores.logsumexp(-1), maxima
