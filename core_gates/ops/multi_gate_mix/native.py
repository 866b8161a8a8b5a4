"""Mixing by pairs of gate and expert in C++, for float32 on the CPU."""

from pathlib import Path

import torch
from torch import Tensor

from core_gates.ops._native import library, run_rows

SOURCE = Path(__file__).with_name("kernel.cpp")
ROWS = 64
"""Rows of a call where there are threads."""


def mix(experts: Tensor, weights: Tensor, pairs: Tensor, out: Tensor) -> None:
    """Write the mixtures (S, N, D) of experts (E, N, D), given weights of pairs (P, N)."""
    _run("mix", [experts.contiguous(), weights, pairs, out], weights, out)


def differentiate(
    grad: Tensor, experts: Tensor, weights: Tensor, pairs: Tensor, of_experts: Tensor
) -> Tensor:
    """Return the gradient of the weights (P, N) and add that of the experts (E, N, D)."""
    of_weights = torch.empty_like(weights)
    tensors = [grad.contiguous(), experts.contiguous(), weights, pairs, of_experts, of_weights]
    _run("differentiate", tensors, weights, grad)
    return of_weights


def _run(name: str, tensors: list[Tensor], weights: Tensor, like: Tensor) -> None:
    number, rows = weights.shape
    chunk = ROWS if torch.get_num_threads() > 1 else max(rows, 1)
    run_rows(getattr(library(SOURCE), name), [*tensors, number, rows, like.shape[2]], rows, chunk)
