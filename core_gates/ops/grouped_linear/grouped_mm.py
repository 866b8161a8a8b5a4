"""``grouped_linear`` by ``torch.nn.functional.grouped_mm``, for bfloat16 on CUDA.

No step waits for ``counts``. On the CPU it is slower than the loop over segments; it knows neither
float64 nor, inside ``torch.compile``, float32; and what it writes beyond the last group is not
initialized, hence the masks.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from core_gates.activations import activate, activation_gradient

_ALIGNMENT = 16  # bytes, of every row


def possible(x: Tensor, weight: Tensor) -> bool:
    """Return whether ``grouped_mm`` takes these operands and is the faster way."""
    if not hasattr(F, "grouped_mm") or x.device.type != "cuda" or x.dtype != torch.bfloat16:
        return False
    sizes = [size * x.element_size() for size in weight.shape[1:]]
    return x.shape[0] > 0 and all(size % _ALIGNMENT == 0 for size in sizes)


def forward(
    x: Tensor,
    weight: Tensor,
    counts: Tensor,
    bias: Tensor | None,
    gather: Tensor | None,
    scatter: Tensor | None,
    activation: str,
    gated: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Return results, and values before the activation if kept, by ``torch`` grouped matmuls."""
    rows = (x if gather is None else x.index_select(0, gather)).contiguous()
    offsets = counts.cumsum(0, dtype=torch.int32)
    z = F.grouped_mm(rows, weight.mT, offs=offsets)
    if bias is not None:
        row = torch.arange(rows.shape[0], device=x.device, dtype=torch.int32)
        group = torch.searchsorted(offsets, row, right=True)
        z = z + bias[group.clamp(max=counts.shape[0] - 1)]
    z = _routed(z, offsets)
    plain = activation == "identity" and not gated
    out = z if plain else _routed(activate(z, activation, gated), offsets)
    kept = z if keep and not plain else z.new_empty(0, z.shape[1])
    return (out if scatter is None else torch.empty_like(out).index_copy_(0, scatter, out)), kept


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    counts: Tensor,
    gather: Tensor | None,
    scatter: Tensor | None,
    kept: Tensor,
    activation: str,
    gated: bool,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias; empty where they are not needed."""
    rows = (x if gather is None else x.index_select(0, gather)).contiguous()
    offsets = counts.cumsum(0, dtype=torch.int32)
    outer = (grad if scatter is None else grad.index_select(0, scatter)).contiguous()
    if activation != "identity" or gated:
        outer = activation_gradient(outer, kept, activation, gated)
    outer = _routed(outer, offsets)
    grad_x, grad_weight = x.new_empty(0), weight.new_empty(0)
    grad_bias = weight.new_zeros(weight.shape[:2] if needs_bias else (0,))
    if needs_x:
        grad_x = _routed(F.grouped_mm(outer, weight, offs=offsets), offsets)
        if gather is not None:
            zeros = torch.zeros_like(x, memory_format=torch.contiguous_format)
            grad_x = zeros.index_add_(0, gather, grad_x)
    if needs_weight:
        grad_weight = F.grouped_mm(outer.t(), rows, offs=offsets)
    if needs_bias:
        row = torch.arange(rows.shape[0], device=x.device, dtype=torch.int32)
        group = torch.searchsorted(offsets, row, right=True).clamp(max=counts.shape[0] - 1)
        grad_bias.index_add_(0, group, outer)
    return grad_x, grad_weight, grad_bias


def _routed(rows: Tensor, offsets: Tensor) -> Tensor:
    row = torch.arange(rows.shape[0], device=rows.device).unsqueeze(1)
    return torch.where(row < offsets[-1], rows, 0)
