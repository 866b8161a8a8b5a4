"""Triton kernels of ``gate_multiply``; same functions and arguments as ``reference.py``."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from core_gates.ops._select import in_layout_of, launch_elementwise


@triton.jit
def _forward_kernel(x, logits, out, numel, BLOCK: tl.constexpr):
    """Write ``x * sigmoid(logits)``."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < numel
    gate = tl.sigmoid(tl.load(logits + i, inside).to(tl.float32))
    tl.store(out + i, tl.load(x + i, inside).to(tl.float32) * gate, inside)


@triton.jit
def _backward_kernel(grad, x, logits, grad_x, grad_logits, numel, BLOCK: tl.constexpr):
    """Recompute the gate from the saved logits and write both gradients."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < numel
    logit = tl.load(logits + i, inside).to(tl.float32)
    outer = tl.load(grad + i, inside).to(tl.float32) * tl.sigmoid(logit)
    tl.store(grad_x + i, outer, inside)
    value = tl.load(x + i, inside).to(tl.float32)
    tl.store(grad_logits + i, outer * tl.sigmoid(-logit) * value, inside)


def forward(x: Tensor, logits: Tensor) -> Tensor:
    """Return ``x * sigmoid(logits)``."""
    out = torch.empty_like(x)
    inputs = [in_layout_of(out, t) for t in (x, logits)]
    launch_elementwise(_forward_kernel, *inputs, out)
    return out


def backward(grad: Tensor, x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients with respect to ``x`` and ``logits``."""
    grad_x = torch.empty_like(x)
    grad_logits = torch.empty_like(grad_x, dtype=logits.dtype)
    inputs = [in_layout_of(grad_x, t) for t in (grad, x, logits)]
    launch_elementwise(_backward_kernel, *inputs, grad_x, grad_logits)
    return grad_x, in_layout_of(logits, grad_logits)
