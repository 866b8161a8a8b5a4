"""What the gates of SeerAttention learn from: the attention of the frozen model, by block."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from core_gates.attention.seer.gate import pad_to_blocks
from core_gates.errors import check_fraction, check_option
from core_gates.numerics import accumulation_dtype, widest_float
from core_gates.padding import check_padding_mask

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
        num_kv_heads: Key heads K; the maximum is taken over the heads of each group.

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
    padding_mask: Tensor | None = None,
    block_size: int = 64,
    skip: float = 0.25,
    reduction: Literal["element", "row"] = "element",
) -> Tensor:
    """Return the divergence KL(target, softmax(logits)).

    The first rows, in which there is nothing to choose, are left out. So are rows and columns of
    padding: the loss of a padded batch is that of its sequences alone, averaged over all their
    elements or rows.

    Args:
        logits: Logits of a gate (B, H, rows, N), which was given the same padding.
        target: Distributions of the same shape; constants. What they hold at padding is ignored,
            and what is left of a row is scaled to the sum 1.
        padding_mask: True (B, T) at tokens to ignore; rows are tokens or blocks of tokens.
        block_size: Tokens of a block, needed for the padding alone.
        skip: Fraction of the rows of a sequence that is left out; published are 0.25 for prefill,
            0.5 for decoding.
        reduction: ``element`` averages over all elements as the published training does, whose
            loss is then scaled by 10; ``row`` averages over rows and is N times as large.

    Returns:
        A float32 scalar (float64 for float64); 0 where there is nothing but padding.

    Raises:
        ValueError: The shapes differ or do not fit the padding, ``skip`` lies outside [0, 1) or the
            reduction is unknown.
    """
    if logits.shape != target.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)} and target {tuple(target.shape)} must have one shape"
        )
    check_fraction(skip=skip)
    check_option("reduction", reduction, ("element", "row"))
    dtype = accumulation_dtype(logits)
    logits, target = logits.to(dtype), target.detach().to(dtype)
    if padding_mask is not None:
        return _padded_loss(logits, target, padding_mask, block_size, skip, reduction)
    first = int(skip * logits.shape[-2])
    logits, target = logits[..., first:, :], target[..., first:, :]
    losses = F.kl_div(logits.log_softmax(-1), target, reduction="none")
    return losses.mean() if reduction == "element" else losses.sum(-1).mean()


def _padded_loss(
    logits: Tensor,
    target: Tensor,
    padding_mask: Tensor,
    block_size: int,
    skip: float,
    reduction: str,
) -> Tensor:
    batch, heads, num_rows, num_blocks = logits.shape
    length = padding_mask.shape[-1]
    check_padding_mask(padding_mask, (batch, length))
    if num_blocks != -(-length // block_size) or num_rows not in (length, num_blocks):
        raise ValueError(
            f"logits {tuple(logits.shape)} must have a row for each of {length} tokens or"
            f" {-(-length // block_size)} blocks of {block_size}, and a column for each block"
        )
    columns = ~pad_to_blocks(padding_mask, block_size).all(-1)  # (B, N), True = holds a token
    rows = ~padding_mask if num_rows == length else columns
    number = rows.sum(-1, keepdim=True)
    rows = rows & (
        rows.cumsum(-1) > (skip * number.to(widest_float(number.device))).long()
    )  # without the first of a sequence
    seen = (rows[:, :, None] & columns[:, None, :])[:, None]  # (B, 1, rows, N)
    target = target.masked_fill(~seen, 0)
    target = target / target.sum(-1, keepdim=True).clamp(min=torch.finfo(target.dtype).tiny)
    lowest = torch.finfo(logits.dtype).min
    log_probs = logits.masked_fill(~columns[:, None, None, :], lowest).log_softmax(-1)
    losses = F.kl_div(log_probs.masked_fill(~seen, 0), target, reduction="none")
    counted = seen if reduction == "element" else rows
    return losses.sum() / (heads * counted.sum()).clamp(min=1)
