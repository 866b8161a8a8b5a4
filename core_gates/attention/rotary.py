"""Rotary position embedding in the rotate-half convention."""

import torch
from torch import Tensor


def rotate(x: Tensor, positions: Tensor, theta: float = 10000.0) -> Tensor:
    """Rotate features i and i + D / 2 of ``x`` by ``position * theta ** (-2 i / D)``.

    This is the convention of Llama and Qwen (RoFormer, arXiv 2104.09864, with other pairs).

    Args:
        x: Values (..., T, H, D).
        positions: Position of every token (..., T) or (T,).
        theta: Base of the wavelengths.

    Returns:
        Rotated values of the shape and dtype of ``x``.

    Raises:
        ValueError: D is odd.
    """
    dim = x.shape[-1]
    if dim % 2:
        raise ValueError(f"rotary embedding needs an even number of features, got {dim}")
    acc = torch.promote_types(x.dtype, torch.float32)
    exponents = torch.arange(0, dim, 2, device=x.device, dtype=acc) / dim
    angles = positions.to(acc)[..., None, None] * theta**-exponents
    cos, sin = angles.cos(), angles.sin()
    first, second = x.to(acc).chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
