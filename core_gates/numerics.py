"""Numerics that every routing gate shares: float32 logits and a stable choice of the largest."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from core_gates.padding import check_padding_mask


def linear_fp32(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """Return ``x @ weight.T + bias`` in float32 (float64 if an operand is), also under autocast.

    Args:
        x: Routing input (..., D).
        weight: Weight (E, D).
        bias: Bias (E,).
        padding_mask: True (...) at positions to ignore; what is not finite there is read as zero,
            else it would reach the gradient of the weight.

    Returns:
        Logits (..., E).

    Raises:
        ValueError: The features of ``x`` are not those of ``weight``, or the mask does not fit.
    """
    if x.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"x {tuple(x.shape)} must end in the {weight.shape[1]} features of a gate")
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    if padding_mask is not None:
        check_padding_mask(padding_mask, x.shape[:-1])
        x = torch.where(padding_mask.unsqueeze(-1), x.nan_to_num(0.0, 0.0, 0.0), x)
    with _autocast_off(x):
        return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def lowest_index_top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the ``k`` largest scores and their indices; ties go to the lowest index.

    ``torch.topk`` leaves the order of ties open. ``k`` passes of ``argmax``, which promises the
    first maximum, are cheaper than a stable sort. A NaN counts as the largest score.

    Args:
        scores: Scores (..., E).
        k: Number kept, between 1 and E.

    Returns:
        Values, differentiable, and distinct int64 indices, both (..., K), in falling order.
    """
    lowest = torch.finfo(scores.dtype).min
    remaining = scores.detach().clamp(min=lowest)  # -inf becomes available after everything else
    chosen = [remaining.argmax(-1, keepdim=True)]
    for _ in range(k - 1):
        remaining.scatter_(-1, chosen[-1], -torch.inf)
        chosen.append(remaining.argmax(-1, keepdim=True))
    indices = torch.cat(chosen, -1)
    return scores.gather(-1, indices), indices


def widest_float(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on the devices that have nothing wider (Apple's GPUs)."""
    return torch.float32 if device.type == "mps" else torch.float64


def _autocast_off(x: Tensor) -> AbstractContextManager[object]:
    # Autocast knows no meta device.
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
