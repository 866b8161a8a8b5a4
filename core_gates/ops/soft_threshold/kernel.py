"""Triton kernels of ``soft_threshold``; same functions and arguments as ``reference.py``."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from core_gates.ops._select import in_layout_of, launch_elementwise


@triton.jit
def _forward_kernel(x, out, threshold, numel, BLOCK: tl.constexpr):
    """Move every value towards zero by the threshold, and no further."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < numel
    value = tl.load(x + i, inside).to(tl.float32)
    shrunk = tl.where(value > 0, value - threshold, value + threshold)
    # The comparison is false for a NaN, which then passes through.
    tl.store(out + i, tl.where(tl.abs(value) <= threshold, 0.0, shrunk), inside)


@triton.jit
def _backward_kernel(grad, x, grad_x, threshold, numel, BLOCK: tl.constexpr):
    """Pass the gradient where the value survives."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < numel
    value = tl.load(x + i, inside).to(tl.float32)
    outer = tl.load(grad + i, inside).to(tl.float32)
    tl.store(grad_x + i, tl.where(tl.abs(value) > threshold, outer, 0.0), inside)


def forward(x: Tensor, threshold: float) -> Tensor:
    """Return ``sign(x) max(|x| - threshold, 0)``."""
    out = torch.empty_like(x)
    launch_elementwise(_forward_kernel, in_layout_of(out, x), out, threshold)
    return out


def backward(grad: Tensor, x: Tensor, threshold: float) -> Tensor:
    """Return the gradient with respect to ``x``."""
    grad_x = torch.empty_like(x)
    inputs = [in_layout_of(grad_x, t) for t in (grad, x)]
    launch_elementwise(_backward_kernel, *inputs, grad_x, threshold)
    return grad_x
