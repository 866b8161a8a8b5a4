"""Padding masks: True marks a token to ignore."""

from collections.abc import Sequence

import torch
from torch import Tensor


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
