"""Definition of ``silu_gate``: any floating dtype, half precision computed in float32."""

import torch.nn.functional as F
from torch import Tensor

from core_gates.numerics import accumulation_dtype


def forward(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``silu(a) * sigmoid(g)`` in the dtype of ``a`` and ``sigmoid(g)`` in that of ``g``."""
    acc = accumulation_dtype(a, g)
    signal, gate = a.to(acc), g.to(acc).sigmoid()
    return (F.silu(signal) * gate).to(a.dtype), gate.to(g.dtype)


def backward(
    grad_product: Tensor, grad_gate: Tensor, a: Tensor, g: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients with respect to ``a`` and ``g``, given those of both outputs."""
    acc = accumulation_dtype(a, g)
    signal, logit, grad = a.to(acc), g.to(acc), grad_product.to(acc)
    slope, gate, closed = signal.sigmoid(), logit.sigmoid(), (-logit).sigmoid()
    grad_a = slope * (1 + signal * (-signal).sigmoid()) * gate * grad
    grad_g = gate * closed * (signal * slope * grad + grad_gate.to(acc))
    return grad_a.to(a.dtype), grad_g.to(g.dtype)
