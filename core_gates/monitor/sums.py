"""Flat float64 vectors of named sums: sums of micro-batches and of ranks just add up."""

import torch
from torch import Tensor


def join(parts: dict[str, Tensor], sizes: dict[str, int]) -> Tensor:
    """Return the parts as one flat float64 vector in the order of ``sizes``."""
    return torch.cat([parts[name].reshape(-1).double() for name in sizes])


def split(total: Tensor, sizes: dict[str, int]) -> dict[str, Tensor]:
    """Return the named parts of a flat vector."""
    return dict(zip(sizes, total.split_with_sizes(list(sizes.values())), strict=True))


def counts(indices: Tensor, counted: Tensor, size: int) -> Tensor:
    """Return how often each of ``size`` indices occurs where ``counted``; others are clamped.

    ``torch.bincount`` would read its size on the host on CUDA; this does not.
    """
    zeros = torch.zeros(size, dtype=torch.float64, device=indices.device)
    indices, counted = indices.clamp(0, size - 1).flatten(), counted.flatten().double()
    return zeros.scatter_add(0, indices, counted)
