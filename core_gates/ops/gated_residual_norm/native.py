"""``gated_residual_norm`` in C++ for float32 on the CPU; same results as ``reference.py``."""

from pathlib import Path

import torch
from torch import Tensor

from core_gates.ops._native import library, run_rows

SOURCE = Path(__file__).with_name("kernel.cpp")
CHUNK = 512
"""Rows of a chunk; their sums over rows are taken in float32, and those of chunks by torch."""


def forward(
    x: Tensor, branch: Tensor, scores: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return the sum and its normalization (N, D)."""
    inputs = [t.contiguous() for t in (x, branch, scores, weight, bias)]
    total, normalized = (_empty_like(x) for _ in range(2))
    arguments = [*inputs, total, normalized, x.shape[1], float(eps)]
    run_rows(library(SOURCE).forward, arguments, len(x), CHUNK)
    return total, normalized


def backward(
    grad_total: Tensor,
    grad_normalized: Tensor,
    total: Tensor,
    branch: Tensor,
    scores: Tensor,
    weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, branch, scores, weight and bias, given the sum ``total``."""
    inputs = [t.contiguous() for t in (grad_total, grad_normalized, total, branch, scores, weight)]
    rows, dim = total.shape
    grad_x, grad_branch = (_empty_like(total) for _ in range(2))
    sums = total.new_zeros(-(-rows // CHUNK), 3, dim)
    arguments = [*inputs, grad_x, grad_branch, sums, dim, CHUNK, float(eps)]
    run_rows(library(SOURCE).backward, arguments, rows, CHUNK)
    of_scores, of_weight, of_bias = (row.clone() for row in sums.sum(0))
    return grad_x, grad_branch, of_scores, of_weight, of_bias


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
