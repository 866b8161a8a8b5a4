"""Tensors of several adapters, thinned out and combined entry by entry."""

from collections.abc import Sequence

import torch
from torch import Tensor


def combine(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    kind: str,
    density: float,
    generator: torch.Generator,
) -> Tensor:
    """Return the weighted sum of tensors, of which only a part of the entries is kept.

    Args:
        tensors: Of one shape, one per adapter.
        weights: One per adapter.
        kind: ``linear`` keeps all entries; ``magnitude_prune`` and ``ties`` the largest,
            ``dare_linear`` and ``dare_ties`` random ones, divided by the density (Yu et al., 2024).
            The ``ties`` elect a sign for each entry, that of the unweighted sum, and average the
            entries that have it (Yadav et al., 2023).
        density: Fraction of the entries that is kept.
        generator: Where random numbers come from.
    """
    if kind.startswith("dare"):
        tensors = [_drop(tensor, density, generator) for tensor in tensors]
    elif kind != "linear":
        tensors = [_keep_largest(tensor, density) for tensor in tensors]
    stacked = torch.stack(list(tensors))
    factors = torch.as_tensor(weights, dtype=stacked.dtype, device=stacked.device)
    weighted = stacked * factors.view(-1, *[1] * (stacked.ndim - 1))
    if not kind.endswith("ties"):
        return weighted.sum(0)
    elected = torch.where(stacked.sum(0) >= 0, 1, -1)
    agrees = stacked.sign() == elected
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def _keep_largest(tensor: Tensor, density: float) -> Tensor:
    if density >= 1:
        return tensor
    kept = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    mask = torch.zeros_like(tensor).flatten()
    mask[kept] = 1
    return tensor * mask.view_as(tensor)


def _drop(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    if density >= 1:
        return tensor
    chances = torch.full(tensor.shape, density, dtype=tensor.dtype)
    mask = torch.bernoulli(chances, generator=generator).to(tensor.device)
    return tensor * mask / density


def truncate(matrix: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the factors (m, r) and (r, n) of the best approximation of a matrix (m, n).

    Large matrices are decomposed within the subspace that some power iterations find (Halko et
    al., 2011).

    Args:
        matrix: Such as the changed weight of a layer.
        rank: That of the approximation.
        generator: Where the first subspace comes from.
    """
    rank = min(rank, *matrix.shape)
    basis, core = None, matrix
    if min(matrix.shape) > LARGE:
        start = torch.randn(matrix.shape[1], rank + 16, dtype=matrix.dtype, generator=generator)
        basis = torch.linalg.qr(matrix @ start.to(matrix.device)).Q
        for _ in range(6):
            basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
        core = basis.T @ matrix
    left, sizes, right = torch.linalg.svd(core, full_matrices=False)
    roots = sizes[:rank].sqrt()
    left = left[:, :rank] if basis is None else basis @ left[:, :rank]
    return left * roots, roots[:, None] * right[:rank]


LARGE = 1024
"""Matrices with more rows and columns are decomposed by iterations."""
