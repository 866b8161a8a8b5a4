"""Flat vectors of named sums, in float64 where there is one: sums of batches and ranks add up."""

import torch
from torch import Tensor

from core_gates.numerics import widest_float


def exact(values: Tensor) -> Tensor:
    """Return the values in the widest floating dtype of their device."""
    return values.to(widest_float(values.device))


def join(parts: dict[str, Tensor], sizes: dict[str, int]) -> Tensor:
    """Return the parts as one flat vector in the order of ``sizes``."""
    return torch.cat([exact(parts[name]).reshape(-1) for name in sizes])


def split(total: Tensor, sizes: dict[str, int]) -> dict[str, Tensor]:
    """Return the named parts of a flat vector."""
    return dict(zip(sizes, total.split_with_sizes(list(sizes.values())), strict=True))


def counts(indices: Tensor, counted: Tensor, size: int) -> Tensor:
    """Return how often each of ``size`` indices occurs where ``counted``; others are clamped.

    ``torch.bincount`` would read its size on the host on CUDA; this does not.
    """
    zeros = torch.zeros(size, dtype=widest_float(indices.device), device=indices.device)
    indices, counted = indices.clamp(0, size - 1).flatten(), exact(counted).flatten()
    return zeros.scatter_add(0, indices, counted)
