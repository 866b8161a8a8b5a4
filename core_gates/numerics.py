"""Precision, padding, and sums that do not depend on them."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F


def ignored_as_zero(values: Tensor, padding_mask: Tensor | None) -> Tensor:
    """Return values (..., A, B) that are zero where ``padding_mask`` (...) is True.

    Raises:
        ValueError: The mask is not boolean or does not fit.
    """
    if padding_mask is None:
        return values
    check_padding_mask(padding_mask, values.shape[:-2])
    return values.masked_fill(padding_mask[..., None, None], 0)


def check_padding_mask(padding_mask: Tensor, shape: Sequence[int]) -> None:
    """Refuse a mask that is not boolean or does not fit the tokens.

    Attention masks of Hugging Face are integers with the opposite meaning; refusing them here is
    what keeps the two apart.

    Args:
        padding_mask: The mask.
        shape: Leading shape of the routing input.

    Raises:
        ValueError: The dtype is not bool or the shape differs.
    """
    if padding_mask.dtype != torch.bool:
        raise ValueError(
            f"padding_mask must be bool with True = ignore, got {padding_mask.dtype};"
            " convert an attention mask by attention_mask == 0"
        )
    if tuple(padding_mask.shape) != tuple(shape):
        raise ValueError(
            f"padding_mask {tuple(padding_mask.shape)} must have the shape {tuple(shape)} of the"
            " tokens"
        )


def zero_padding(x: Tensor, padding_mask: Tensor | None) -> Tensor:
    """Return features with zeros at padding, whatever it holds; no gradient goes back to it.

    Multiplying by zero would not do: it keeps NaN and infinity.

    Args:
        x: Features (..., D).
        padding_mask: True (...) at tokens to ignore; nothing is ignored if None.

    Raises:
        ValueError: The mask is not boolean or has another shape.
    """
    if padding_mask is None:
        return x
    check_padding_mask(padding_mask, x.shape[:-1])
    return x.masked_fill(padding_mask.unsqueeze(-1), 0)


_HALF = (torch.float16, torch.bfloat16)


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
        padding_mask: True (...) at tokens to ignore; what is not finite there is read as zero,
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
    with autocast_off(x):
        return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype to compute in: the widest of the tensors' dtypes, float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def lowest_index_top_k(
    scores: Tensor, k: int, *, ties: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the ``k`` largest scores and their indices; ties go to the lowest index.

    ``torch.topk`` leaves the order of ties open. ``k`` passes of ``argmax``, which promises the
    first maximum, are cheaper than a stable sort. A NaN counts as the largest score.

    Args:
        scores: Scores (..., E).
        k: Number kept, between 1 and E.
        ties: Second scores (..., E), by which equal ones are ordered first.

    Returns:
        Values, differentiable, and distinct int64 indices, both (..., K), in descending order.
    """
    lowest = torch.finfo(scores.dtype).min
    remaining = scores.detach().clamp(min=lowest)  # -inf becomes available after everything else
    if ties is not None:  # about as expensive as the passes
        remaining = _break_ties(remaining, ties.detach(), k)
    chosen = [remaining.argmax(-1, keepdim=True)]
    for _ in range(k - 1):
        remaining.scatter_(-1, chosen[-1], -torch.inf)
        chosen.append(remaining.argmax(-1, keepdim=True))
    indices = torch.cat(chosen, -1)
    if ties is not None:
        _, order = stable_sort(scores.detach().gather(-1, indices), descending=True)
        indices = indices.gather(-1, order)
    return scores.gather(-1, indices), indices


def unrounded(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return ``fn`` of ``nn.Module._apply`` without its cast to half precision.

    For what must stay exact in ``module.to(torch.bfloat16)``; it still moves between devices.
    """

    def moved(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        rounded = result.dtype in _HALF and tensor.dtype not in _HALF
        return tensor.to(result.device) if rounded else result

    return moved


def _break_ties(scores: Tensor, ties: Tensor, k: int) -> Tensor:
    """Return scores with the same ``k`` largest, where those equal to the k-th are their ``ties``.

    What is larger is infinite, what is smaller is -inf.
    """
    least = scores.topk(k).values[..., -1:]
    ties = ties.clamp(torch.finfo(ties.dtype).min, torch.finfo(ties.dtype).max)
    return ties.masked_fill_(scores > least, torch.inf).masked_fill_(scores < least, -torch.inf)


def stable_sort(
    values: Tensor, *, dim: int = -1, descending: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the values in order and where they were; equal values keep their order.

    ONNX has no stable sort, but its ``TopK``, to which a plain sort is exported, keeps the order of
    equal values.

    Args:
        values: Values, sorted along ``dim``.
        dim: Dimension along which they are sorted.
        descending: Whether the largest comes first.
    """
    if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        return torch.sort(values, dim, descending)
    return torch.sort(values, stable=True, dim=dim, descending=descending)


def widest_float(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on the devices that have nothing wider (Apple's GPUs)."""
    return torch.float32 if device.type == "mps" else torch.float64


def content_version(buffer: Tensor) -> tuple[int, int] | None:
    """Return a key that changes with a buffer's content, without reading it from the device.

    None where reading is cheap, on the CPU, or where nothing counts the changes.
    """
    if buffer.is_cpu or buffer.is_inference():
        return None
    return buffer.data_ptr(), buffer._version


def autocast_off(x: Tensor) -> AbstractContextManager[object]:
    """Switch autocast off on the device of ``x``; autocast has no meta device."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast makes of a linear layer of ``x``; None where it leaves it."""
    left = x.dtype == torch.float64 or x.is_meta or not torch.is_autocast_enabled(x.device.type)
    return None if left else torch.get_autocast_dtype(x.device.type)
