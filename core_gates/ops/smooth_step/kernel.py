"""Triton kernels of ``smooth_step``; same functions and arguments as ``reference.py``."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from core_gates.ops._select import in_layout_of, launch_elementwise


@triton.jit
def _forward_kernel(z, out, gamma, numel, BLOCK: tl.constexpr):
    """Write the smooth step."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < numel
    place = (tl.load(z + i, inside).to(tl.float32) + gamma * 0.5) / gamma
    place = tl.where(place < 0.0, 0.0, place)  # a minimum or maximum would hide a NaN
    place = tl.where(place > 1.0, 1.0, place)
    tl.store(out + i, place * place * (3.0 - 2.0 * place), inside)


@triton.jit
def _backward_kernel(grad, z, grad_z, gamma, numel, BLOCK: tl.constexpr):
    """Recompute the place in the band and write the gradient."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < numel
    place = (tl.load(z + i, inside).to(tl.float32) + gamma * 0.5) / gamma
    place = tl.where(place < 0.0, 0.0, place)  # a minimum or maximum would hide a NaN
    place = tl.where(place > 1.0, 1.0, place)
    slope = tl.load(grad + i, inside).to(tl.float32) * 6.0 * place * (1.0 - place)
    tl.store(grad_z + i, slope / gamma, inside)


def forward(z: Tensor, gamma: float) -> Tensor:
    """Return the smooth step of ``z``."""
    out = torch.empty_like(z)
    launch_elementwise(_forward_kernel, in_layout_of(out, z), out, gamma)
    return out


def backward(grad: Tensor, z: Tensor, gamma: float) -> Tensor:
    """Return the gradient with respect to ``z``."""
    grad_z = torch.empty_like(z)
    inputs = [in_layout_of(grad_z, t) for t in (grad, z)]
    launch_elementwise(_backward_kernel, *inputs, grad_z, gamma)
    return grad_z
