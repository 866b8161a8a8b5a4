"""Definition of ``soft_threshold``: any floating dtype, half precision computed in float32."""

import torch
from torch import Tensor
from torch.nn import functional as F


def forward(x: Tensor, threshold: float) -> Tensor:
    """Return ``sign(x) max(|x| - threshold, 0)`` in the dtype of ``x``."""
    acc = torch.promote_types(x.dtype, torch.float32)
    return F.softshrink(x.to(acc), threshold).to(x.dtype)


def backward(grad: Tensor, x: Tensor, threshold: float) -> Tensor:
    """Return the gradient with respect to ``x``: that of the output where ``|x| > threshold``."""
    acc = torch.promote_types(x.dtype, torch.float32)
    return torch.where(x.to(acc).abs() > threshold, grad, 0).to(x.dtype)
