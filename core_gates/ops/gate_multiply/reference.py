"""Definition of ``gate_multiply``: any floating dtype, half precision computed in float32."""

from torch import Tensor

from core_gates.numerics import accumulation_dtype


def forward(x: Tensor, logits: Tensor) -> Tensor:
    """Return ``x * sigmoid(logits)`` in the dtype of ``x``."""
    acc = accumulation_dtype(x, logits)
    return (x.to(acc) * logits.to(acc).sigmoid()).to(x.dtype)


def backward(grad: Tensor, x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients with respect to ``x`` and ``logits``."""
    acc = accumulation_dtype(x, logits)
    value, logit, grad = x.to(acc), logits.to(acc), grad.to(acc)
    gate, closed = logit.sigmoid(), (-logit).sigmoid()
    return (gate * grad).to(x.dtype), (gate * closed * value * grad).to(logits.dtype)
