"""``gated_residual_norm`` and its registration, in C++ for float32 on the CPU."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef, custom_op

from core_gates.ops._native import library, run_rows
from core_gates.ops._select import definition, register_direction, use_cpp, use_kernel
from core_gates.ops.gated_residual_norm import reference

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


def gated_residual_norm(
    x: Tensor,
    branch: Tensor,
    scores: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Add a gated branch to the residual stream and normalize the sum for the next branch.

    ``y = x + s * branch`` and ``LayerNorm(y)``, the seam between two branches of a pre-norm
    transformer with feature-selection gates. The chain is bound by memory: fused it reads both
    inputs once and writes both outputs once.

    Args:
        x: Residual stream (..., D).
        branch: Output of attention or MLP (..., D).
        scores: Score of each feature (D,), after its rectifier.
        weight: Weight of the LayerNorm (D,).
        bias: Bias of the LayerNorm (D,).
        eps: Added to the variance.

    Returns:
        The new stream ``y`` and its normalization, both (..., D) in the dtype of ``x``.

    Raises:
        ValueError: The shapes do not fit.
    """
    if x.shape != branch.shape or x.ndim == 0:
        raise ValueError(f"x {tuple(x.shape)} and branch {tuple(branch.shape)} must have one shape")
    dim = x.shape[-1]
    for name, vector in (("scores", scores), ("weight", weight), ("bias", bias)):
        if vector.shape != (dim,):
            raise ValueError(f"{name} {tuple(vector.shape)} must have the shape ({dim},)")
    cpp = use_cpp(x, branch, scores, weight, bias)
    if not cpp and not use_kernel(x, branch, scores, weight):
        return definition(reference.forward)(x, branch, scores, weight, bias, eps)
    rows = x.reshape(-1, dim), branch.reshape(-1, dim)
    total, normalized = (_cpp if cpp else _forward)(*rows, scores, weight, bias, eps)
    return total.view(x.shape), normalized.view(x.shape)


def _fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _fake_backward(
    _grad_total: Tensor,
    _grad_normalized: Tensor,
    x: Tensor,
    branch: Tensor,
    scores: Tensor,
    weight: Tensor,
    _eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    vectors = torch.empty_like(scores), torch.empty_like(weight), torch.empty_like(weight)
    return x.new_empty(x.shape), branch.new_empty(branch.shape), *vectors


def _differentiable(forward: CustomOpDef, backward: CustomOpDef, *, by_sum: bool) -> None:
    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, branch, scores, weight, _, ctx.eps = inputs
        ctx.save_for_backward(output[0] if by_sum else x, branch, scores, weight)

    def differentiate(ctx: Any, grad_total: Tensor, grad_normalized: Tensor) -> Any:
        return *backward(grad_total, grad_normalized, *ctx.saved_tensors, ctx.eps), None

    forward.register_autograd(differentiate, setup_context=save)


_forward = register_direction(reference, "forward", _fake)
_differentiable(_forward, register_direction(reference, "backward", _fake_backward), by_sum=False)
_cpp = custom_op("core_gates::gated_residual_norm_cpp", forward, mutates_args=())
_cpp.register_fake(_fake)
_cpp_backward = custom_op("core_gates::gated_residual_norm_cpp_backward", backward, mutates_args=())
_cpp_backward.register_fake(_fake_backward)
_differentiable(_cpp, _cpp_backward, by_sum=True)
