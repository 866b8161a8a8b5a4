"""``gated_lora`` in C++ for float32 on the CPU, and its gradients for frozen adapters."""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from core_gates.ops._native import library, run_rows
from core_gates.ops.gated_lora import reference
from core_gates.ops.gated_lora.streamed import group_size

SOURCE = Path(__file__).with_name("kernel.cpp")
BACKWARD = Path(__file__).with_name("backward.cpp")
CHUNK = 16
"""Tokens of a chunk, for which a block of features of all adapters stays in the cache."""

ELEMENTS = 2**15
"""Numbers of a chunk of narrow layers, which would else be many calls."""

BACKWARD_CHUNK = 256
"""Tokens of a chunk of the backward pass, each with its own gradients of the coefficients."""

FEATURES = 64
"""The number of features must be a multiple of this one."""


def possible(base: Tensor) -> bool:
    """Return whether the kernels take this number of features."""
    return base.shape[-1] % FEATURES == 0


def chunk_size(dim: int) -> int:
    """Return the tokens of a chunk, more of them where they have few features."""
    return max(CHUNK, ELEMENTS // dim // CHUNK * CHUNK)


def forward(
    base: Tensor,
    hidden: Tensor,
    up: Tensor,
    coefficients: Tensor,
    ranks: Sequence[int],
    eps: float,
    out: Tensor,
) -> Tensor:
    """Write what ``reference.forward`` returns into ``out`` (``base`` itself, too) and return it.

    Logits are clamped to ±40: a gate is never further than 4e-18 from what it would be.
    """
    mean, rstd = reference.statistics(hidden, up, ranks, eps)
    ends = torch.tensor(list(accumulate(ranks)), dtype=torch.int64, device="cpu")
    packed = up.view(len(up), -1, FEATURES).transpose(0, 1)
    inputs = [t.contiguous() for t in (base, hidden, mean, rstd, packed, coefficients)]
    target = out if out.is_contiguous() else out.contiguous()
    group = group_size(base, coefficients)
    arguments = [*inputs, ends, target, len(ranks), base.shape[1], group, float(eps)]
    chunk = chunk_size(base.shape[1]) if coefficients.ndim == 2 else group
    run_rows(library(SOURCE).mix, arguments, len(base), chunk)
    return out if target is out else out.copy_(target)


def backward(
    grad: Tensor,
    base: Tensor,
    hidden: Tensor,
    up: Tensor,
    coefficients: Tensor,
    ranks: Sequence[int],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what ``reference.backward`` returns for ``base``, ``hidden`` and ``coefficients``.

    With ``g`` the gradient of the normalized output ``z`` of an adapter, that of its hidden
    activations is ``(direct + rstd g) U^T - rstd (Σ g m + Σ g z · rstd h G)``: the part that the
    norm removes follows from the row means ``m`` and the Gram matrix ``G`` of ``U``.
    """
    mean, rstd = reference.statistics(hidden, up, ranks, eps)
    tokens, dim = base.shape
    packed = up.view(len(up), -1, FEATURES).transpose(0, 1)
    inputs = [t.contiguous() for t in (grad, base, hidden, mean, rstd, packed, coefficients)]
    ends = torch.tensor(list(accumulate(ranks)), dtype=torch.int64, device="cpu")
    grad_base = torch.empty_like(inputs[1])
    along, sums = torch.empty_like(inputs[2]), base.new_empty(tokens, len(ranks), 2)
    group = group_size(base, coefficients)
    chunk = BACKWARD_CHUNK if coefficients.ndim == 2 else group
    pieces = -(-tokens // chunk) if coefficients.ndim == 2 else len(coefficients)
    shared = base.new_zeros(pieces, *coefficients.shape[-2:])
    arguments = [*inputs, ends, grad_base, along, sums, shared]
    sizes = [len(ranks), dim, group, chunk, float(eps)]
    run_rows(library(BACKWARD).mix_backward, [*arguments, *sizes], tokens, chunk)
    adapters = zip(
        torch.split(inputs[2], list(ranks), -1), torch.split(up, list(ranks)), strict=True
    )
    for k, (h, u) in enumerate(adapters):
        row_mean, gram = reference.moments(u)
        slope = along[:, sum(ranks[:k]) : sum(ranks[: k + 1])]
        removed = sums[:, k, :1] * row_mean.mT + sums[:, k, 1:] * rstd[:, k : k + 1] * (h @ gram)
        slope -= rstd[:, k : k + 1] * removed
    return grad_base, along, shared.sum(0) if coefficients.ndim == 2 else shared
