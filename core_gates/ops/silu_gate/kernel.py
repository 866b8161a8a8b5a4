"""Triton kernels of ``silu_gate``; same functions and arguments as ``reference.py``."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from core_gates.ops._select import in_layout_of, launch_elementwise


@triton.jit
def _forward_kernel(a, g, product, gate, numel, BLOCK: tl.constexpr):
    """Write both outputs from one read of each input."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < numel
    signal = tl.load(a + i, inside).to(tl.float32)
    opening = tl.sigmoid(tl.load(g + i, inside).to(tl.float32))
    tl.store(product + i, signal * tl.sigmoid(signal) * opening, inside)
    tl.store(gate + i, opening, inside)


@triton.jit
def _backward_kernel(grad_product, grad_gate, a, g, grad_a, grad_g, numel, BLOCK: tl.constexpr):
    """Recompute the activations from the saved inputs and write both gradients."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < numel
    signal = tl.load(a + i, inside).to(tl.float32)
    logit = tl.load(g + i, inside).to(tl.float32)
    grad = tl.load(grad_product + i, inside).to(tl.float32)
    slope, gate = tl.sigmoid(signal), tl.sigmoid(logit)
    outer = grad * signal * slope + tl.load(grad_gate + i, inside).to(tl.float32)
    tl.store(grad_a + i, grad * gate * slope * (1 + signal * tl.sigmoid(-signal)), inside)
    tl.store(grad_g + i, outer * gate * tl.sigmoid(-logit), inside)


def forward(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``silu(a) * sigmoid(g)`` and ``sigmoid(g)``."""
    product = torch.empty_like(a)
    gate = torch.empty_like(product, dtype=g.dtype)
    inputs = [in_layout_of(product, t) for t in (a, g)]
    launch_elementwise(_forward_kernel, *inputs, product, gate)
    return product, in_layout_of(g, gate)


def backward(
    grad_product: Tensor, grad_gate: Tensor, a: Tensor, g: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients with respect to ``a`` and ``g``."""
    grad_a = torch.empty_like(a)
    grad_g = torch.empty_like(grad_a, dtype=g.dtype)
    inputs = [in_layout_of(grad_a, t) for t in (grad_product, grad_gate, a, g)]
    launch_elementwise(_backward_kernel, *inputs, grad_a, grad_g)
    return grad_a, in_layout_of(g, grad_g)
