"""Triton kernels of ``gated_residual_norm``; same functions and arguments as ``reference.py``."""

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_PROGRAMS = 512  # of the backward pass; each sums its rows, a second pass sums the programs


@triton.jit
def _row(x, branch, score, row, d, D, eps):
    """Return the sum of one row, its normalized form and its reciprocal deviation."""
    inside = d < D
    value = tl.load(x + row * D + d, inside, other=0.0).to(tl.float32)
    added = tl.load(branch + row * D + d, inside, other=0.0).to(tl.float32)
    total = value + score * added
    centered = tl.where(inside, total - tl.sum(total, 0) / D, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centered * centered, 0) / D + eps)
    return total, centered * rstd, rstd, added


@triton.jit
def _forward_kernel(
    x, branch, scores, weight, bias, total, normalized, D, eps, BLOCK: tl.constexpr
):
    """Read one row of both inputs once and write both outputs."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < D
    score = tl.load(scores + d, inside, other=0.0).to(tl.float32)
    value, unit, _, _ = _row(x, branch, score, row, d, D, eps)
    scale = tl.load(weight + d, inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + d, inside, other=0.0).to(tl.float32)
    tl.store(total + row * D + d, value, inside)
    tl.store(normalized + row * D + d, unit * scale + shift, inside)


@triton.jit
def _backward_kernel(
    grad_total, grad_normalized, x, branch, scores, weight, grad_x, grad_branch, partials,
    num_rows, D, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    """Recompute the rows of one program; write their gradients and the sums over these rows.

    The sums are deterministic: no atomics.
    """
    program = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    inside = d < D
    score = tl.load(scores + d, inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + d, inside, other=0.0).to(tl.float32)
    grad_scores = tl.zeros((BLOCK,), tl.float32)
    grad_weight = tl.zeros((BLOCK,), tl.float32)
    grad_bias = tl.zeros((BLOCK,), tl.float32)
    for i in range(program, num_rows, tl.num_programs(0)):
        row = tl.cast(i, tl.int64)
        _, unit, rstd, added = _row(x, branch, score, row, d, D, eps)
        outer = tl.load(grad_normalized + row * D + d, inside, other=0.0).to(tl.float32)
        scaled = outer * scale
        mean, slope = tl.sum(scaled, 0) / D, tl.sum(scaled * unit, 0) / D
        grad = tl.load(grad_total + row * D + d, inside, other=0.0).to(tl.float32)
        grad += rstd * (scaled - mean - unit * slope)
        tl.store(grad_x + row * D + d, grad, inside)
        tl.store(grad_branch + row * D + d, grad * score, inside)
        grad_scores += grad * added
        grad_weight += outer * unit
        grad_bias += outer
    place = partials + program.to(tl.int64) * 3 * D + d
    tl.store(place, grad_scores, inside)
    tl.store(place + D, grad_weight, inside)
    tl.store(place + 2 * D, grad_bias, inside)


def forward(
    x: Tensor, branch: Tensor, scores: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return ``x + scores * branch`` and its LayerNorm, both (N, D) in the dtype of ``x``."""
    inputs = [t.contiguous() for t in (x, branch, scores, weight, bias)]
    total, normalized = torch.empty_like(inputs[0]), torch.empty_like(inputs[0])
    num_rows, dim = x.shape
    if total.numel():
        with torch.cuda.device_of(x):
            _forward_kernel[(num_rows,)](
                *inputs, total, normalized, dim, eps, BLOCK=triton.next_power_of_2(dim)
            )
    return total, normalized


def backward(
    grad_total: Tensor,
    grad_normalized: Tensor,
    x: Tensor,
    branch: Tensor,
    scores: Tensor,
    weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients with respect to x, branch, scores, weight and bias."""
    tensors = grad_total, grad_normalized, x, branch, scores, weight
    inputs = [t.contiguous() for t in tensors]
    grad_x, grad_branch = torch.empty_like(inputs[2]), torch.empty_like(inputs[3])
    num_rows, dim = x.shape
    num_programs = min(num_rows, NUM_PROGRAMS)
    partials = torch.empty(num_programs, 3, dim, dtype=torch.float32, device=x.device)
    if partials.numel():
        with torch.cuda.device_of(x):
            _backward_kernel[(num_programs,)](
                *inputs, grad_x, grad_branch, partials, num_rows, dim, eps,
                BLOCK=triton.next_power_of_2(dim),
            )  # fmt: skip
    grad_scores, grad_weight, grad_bias = partials.sum(0)
    return (
        grad_x,
        grad_branch,
        grad_scores.to(scores.dtype),
        grad_weight.to(weight.dtype),
        grad_bias.to(weight.dtype),
    )
