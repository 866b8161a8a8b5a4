"""Definition of ``soft_threshold``: any floating dtype, half precision computed in float32."""

import torch
from torch import Tensor
from torch.nn import functional as F

from core_gates.numerics import accumulation_dtype


def forward(x: Tensor, threshold: float) -> Tensor:
    """Return ``sign(x) max(|x| - threshold, 0)`` in the dtype of ``x``."""
    acc = accumulation_dtype(x)
    return F.softshrink(x.to(acc), threshold).to(x.dtype)


def backward(grad: Tensor, x: Tensor, threshold: float) -> Tensor:
    """Return the gradient with respect to ``x``: that of the output where ``|x| > threshold``."""
    acc = accumulation_dtype(x)
    return torch.where(x.to(acc).abs() > threshold, grad, 0).to(x.dtype)
