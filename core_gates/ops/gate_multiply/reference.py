"""Definition of ``gate_multiply``: any floating dtype, half precision computed in float32."""

import torch
from torch import Tensor


def forward(x: Tensor, logits: Tensor) -> Tensor:
    """Return ``x * sigmoid(logits)`` in the dtype of ``x``."""
    acc = _accumulation_dtype(x, logits)
    return (x.to(acc) * logits.to(acc).sigmoid()).to(x.dtype)


def backward(grad: Tensor, x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients with respect to ``x`` and ``logits``."""
    acc = _accumulation_dtype(x, logits)
    value, logit, grad = x.to(acc), logits.to(acc), grad.to(acc)
    gate, closed = logit.sigmoid(), (-logit).sigmoid()
    return (gate * grad).to(x.dtype), (gate * closed * value * grad).to(logits.dtype)


def _accumulation_dtype(x: Tensor, logits: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, logits.dtype), torch.float32)
