"""Rotary position embedding."""

import torch
from torch import Tensor

from core_gates.numerics import accumulation_dtype


def rotate(
    x: Tensor, positions: Tensor, theta: float = 10000.0, *, interleaved: bool = False
) -> Tensor:
    """Rotate pair i of the features of ``x`` by ``position * theta ** (-2 i / D)``.

    The dot product of a rotated query and a rotated key depends on the distance of their positions
    alone (RoFormer, Su et al., 2021, arXiv 2104.09864).

    Args:
        x: Queries or keys (..., D).
        positions: Positions, broadcastable to (...): (T,) for heads before tokens
            (B, H, T, D), (T, 1) for tokens before heads (B, T, H, D).
        theta: Base of the wavelengths.
        interleaved: Whether pair i is features 2 i and 2 i + 1, as in RoFormer and GPT-J, rather
            than i and i + D / 2 (rotate-half), as in Llama and Qwen.

    Returns:
        Rotated values of the shape and dtype of ``x``, computed in float32 at least.

    Raises:
        ValueError: D is odd.
    """
    dim = x.shape[-1]
    if dim % 2:
        raise ValueError(f"rotary embedding needs an even number of features, got {dim}")
    acc = accumulation_dtype(x)
    exponents = torch.arange(0, dim, 2, device=x.device, dtype=acc) / dim
    angles = positions.to(acc).unsqueeze(-1) * theta**-exponents
    cos, sin = angles.cos(), angles.sin()
    axis = -1 if interleaved else -2  # of the two in a pair, once the features are cut into pairs
    pairs = x.to(acc).reshape(*x.shape[:-1], *((dim // 2, 2) if interleaved else (2, dim // 2)))
    first, second = pairs.unbind(axis)
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], axis)
    return turned.flatten(-2).to(x.dtype)
