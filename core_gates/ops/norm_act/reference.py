"""Definition of ``norm_act``: any floating dtype, half precision computed in float32.

E experts, N rows, C channels.
"""

import torch
from torch import Tensor

from core_gates.activations import activate, activation_gradient
from core_gates.numerics import accumulation_dtype

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    activation: str,
    eps: float,
    by_batch: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the activation of ``x`` (E, N, C), normalized, and the statistics (E, C) used.

    Args:
        x: Rows of every expert (E, N, C).
        weight: Factor of every channel (E, C).
        bias: Summand of every channel (E, C).
        mean: Mean of every channel (E, C); not read if ``by_batch``.
        variance: Variance of every channel (E, C); not read if ``by_batch``.
        activation: One of those of experts.
        eps: Added to the variance.
        by_batch: Whether mean and variance are those of the rows of ``x``.
    """
    acc = accumulation_dtype(x, mean)
    exact = x.to(acc)
    if by_batch:
        mean = exact.mean(1)
        variance = (exact - mean.unsqueeze(1)).square().mean(1)
    else:
        mean, variance = mean.to(acc, copy=True), variance.to(acc, copy=True)
    rstd = (variance + eps).rsqrt().unsqueeze(1)
    unit = (exact - mean.unsqueeze(1)) * rstd
    z = unit * weight.to(acc).unsqueeze(1) + bias.to(acc).unsqueeze(1)
    return activate(z, activation, gated=False).to(x.dtype), mean, variance


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    activation: str,
    eps: float,
    by_batch: bool,
) -> Gradients:
    """Return the gradients of x, weight, bias, mean and variance.

    The statistics are those that :func:`forward` returned; their gradients are zero if
    ``by_batch``, where they are no inputs.
    """
    acc = accumulation_dtype(x, mean)
    rstd = (variance + eps).rsqrt()
    unit = (x.to(acc) - mean.unsqueeze(1)) * rstd.unsqueeze(1)
    z = unit * weight.to(acc).unsqueeze(1) + bias.to(acc).unsqueeze(1)
    slope = activation_gradient(grad.to(acc), z, activation, gated=False)
    total, along = slope.sum(1), (slope * unit).sum(1)
    scale = weight.to(acc) * rstd
    if by_batch:
        rows = max(x.shape[1], 1)
        shift = (total.unsqueeze(1) + unit * along.unsqueeze(1)) / rows
        grad_x = scale.unsqueeze(1) * (slope - shift)
        grad_mean, grad_variance = torch.zeros_like(mean), torch.zeros_like(variance)
    else:
        grad_x = scale.unsqueeze(1) * slope
        grad_mean = -scale * total
        grad_variance = -0.5 * scale * rstd * along
    return (
        grad_x.to(x.dtype),
        along.to(weight.dtype),
        total.to(bias.dtype),
        grad_mean,
        grad_variance,
    )
