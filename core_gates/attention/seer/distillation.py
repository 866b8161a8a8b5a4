"""What the gates of SeerAttention learn from: the attention of the frozen model, by block."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

DECODE_EPS = 1e-9


def prefill_target(block_max: Tensor) -> Tensor:
    """Return the distribution over blocks of keys that an `AttnGate` should predict.

    Args:
        block_max: Largest weight of every block (B, H, N, N), of
            `core_gates.ops.block_max_attention`.

    Returns:
        Rows that sum to 1, of the same shape (arXiv 2410.13276, equation 5).
    """
    return block_max / block_max.sum(-1, keepdim=True)


def decode_target(block_max: Tensor, num_kv_heads: int) -> Tensor:
    """Return the distribution over blocks of keys that a `DecodeAttnGate` should predict.

    Args:
        block_max: Largest weight of every query in every block of keys (B, H, T, N), of
            `core_gates.ops.block_max_attention` with ``per_row``.
        num_kv_heads: Heads K of keys; the maximum is taken over the heads of each group.

    Returns:
        Rows that sum to 1, (B, K, T, N) (arXiv 2506.08889).
    """
    batch, heads, *rows = block_max.shape
    grouped = block_max.reshape(batch, num_kv_heads, heads // num_kv_heads, *rows)
    largest = grouped.amax(2)
    return largest / (largest.sum(-1, keepdim=True) + DECODE_EPS)


def gate_distillation_loss(
    logits: Tensor,
    target: Tensor,
    *,
    skip: float = 0.25,
    reduction: Literal["element", "row"] = "element",
) -> Tensor:
    """Return the divergence KL(target, softmax(logits)).

    The first rows, in which there is nothing to choose, are left out.

    Args:
        logits: Logits of a gate (B, H, rows, N).
        target: Distributions of the same shape; constants.
        skip: Share of the rows that is left out; published are 0.25 for prefill, 0.5 for decoding.
        reduction: ``element`` averages over all elements as the published training does, whose
            loss is then scaled by 10; ``row`` averages over rows and is N times as large.

    Returns:
        A float32 scalar (float64 for float64).

    Raises:
        ValueError: The shapes differ, ``skip`` lies outside [0, 1) or the reduction is unknown.
    """
    if logits.shape != target.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and target {tuple(target.shape)} must have one shape"
        )
    if not 0 <= skip < 1:
        raise ValueError(f"skip must lie in [0, 1), got {skip}")
    if reduction not in ("element", "row"):
        raise ValueError(f"reduction must be element or row, got {reduction!r}")
    first = int(skip * logits.shape[-2])
    logits, target = logits[..., first:, :], target[..., first:, :].detach()
    dtype = torch.promote_types(logits.dtype, torch.float32)
    losses = F.kl_div(logits.to(dtype).log_softmax(-1), target.to(dtype), reduction="none")
    return losses.mean() if reduction == "element" else losses.sum(-1).mean()
