"""Definition of ``gated_residual_norm``: any floating dtype, half computed in float32.

N rows, D features. The normalization sees the sum before it is rounded.
"""

from torch import Tensor
from torch.nn import functional as F

from core_gates.numerics import accumulation_dtype

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def forward(
    x: Tensor, branch: Tensor, scores: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return ``x + scores * branch`` and its LayerNorm, both (N, D) in the dtype of ``x``."""
    acc = accumulation_dtype(x, branch)
    total = x.to(acc) + scores.to(acc) * branch.to(acc)
    normalized = F.layer_norm(total, total.shape[-1:], weight.to(acc), bias.to(acc), eps)
    return total.to(x.dtype), normalized.to(x.dtype)


def backward(
    grad_total: Tensor,
    grad_normalized: Tensor,
    x: Tensor,
    branch: Tensor,
    scores: Tensor,
    weight: Tensor,
    eps: float,
) -> Gradients:
    """Return the gradients with respect to x, branch, scores, weight and bias."""
    acc = accumulation_dtype(x, branch)
    total = x.to(acc) + scores.to(acc) * branch.to(acc)
    deviation = total - total.mean(-1, keepdim=True)
    rstd = (deviation.square().mean(-1, keepdim=True) + eps).rsqrt()
    unit, outer = deviation * rstd, grad_normalized.to(acc)
    scaled = outer * weight.to(acc)
    centered = (
        scaled - scaled.mean(-1, keepdim=True) - unit * (scaled * unit).mean(-1, keepdim=True)
    )
    grad_x = grad_total.to(acc) + rstd * centered
    return (
        grad_x.to(x.dtype),
        (grad_x * scores.to(acc)).to(branch.dtype),
        (grad_x * branch.to(acc)).sum(0).to(scores.dtype),
        (outer * unit).sum(0).to(weight.dtype),
        outer.sum(0).to(weight.dtype),
    )
