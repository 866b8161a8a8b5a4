"""Definition of ``norm_act``: any floating dtype, half precision computed in float32.

O outputs of E experts, N rows, C channels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from core_gates.activations import activate, activation_gradient
from core_gates.numerics import accumulation_dtype

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def forward(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    experts: Sequence[int],
    activation: str,
    eps: float,
    by_batch: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the activations of ``x + offset`` (O, N, C), normalized, and the statistics (E, C).

    Args:
        x: Rows of every output (O, N, C).
        offset: Added to ``x`` (E, C).
        weight: Factor of every channel (E, C).
        bias: Summand of every channel (E, C).
        mean: Mean of every channel (E, C); not read if ``by_batch``.
        variance: Variance of every channel (E, C); not read if ``by_batch``.
        experts: Expert of every output (O,), in ascending order.
        activation: One of those of experts.
        eps: Added to the variance.
        by_batch: Whether mean and variance are those of the rows of all outputs of an expert.
    """
    acc = accumulation_dtype(x, mean)
    index = torch.tensor(list(experts), device=x.device)
    exact = x.to(acc) + offset.to(acc)[index].unsqueeze(1)
    if by_batch:
        mean = per_expert(exact.mean(1), experts, len(offset), average=True)
        squares = (exact - mean[index].unsqueeze(1)).square().mean(1)
        variance = per_expert(squares, experts, len(offset), average=True)
    else:
        mean, variance = mean.to(acc, copy=True), variance.to(acc, copy=True)
    scale = weight.to(acc) * (variance + eps).rsqrt()
    z = (exact - mean[index].unsqueeze(1)) * scale[index].unsqueeze(1)
    z = z + bias.to(acc)[index].unsqueeze(1)
    return activate(z, activation, gated=False).to(x.dtype), mean, variance


def backward(
    grad: Tensor,
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    experts: Sequence[int],
    activation: str,
    eps: float,
    by_batch: bool,
) -> Gradients:
    """Return the gradients of x, offset, weight, bias, mean and variance.

    The statistics are those that `forward` returned. If ``by_batch`` they are no inputs, and
    the offset does not matter: these three gradients are zero.
    """
    acc = accumulation_dtype(x, mean)
    index = torch.tensor(list(experts), device=x.device)
    rstd = (variance + eps).rsqrt()
    scale = weight.to(acc) * rstd
    exact = x.to(acc) + (offset.to(acc) - mean)[index].unsqueeze(1)
    unit = exact * rstd[index].unsqueeze(1)
    z = unit * weight.to(acc)[index].unsqueeze(1) + bias.to(acc)[index].unsqueeze(1)
    slope = activation_gradient(grad.to(acc), z, activation, gated=False)
    total = per_expert(slope.sum(1), experts, len(offset))
    along = per_expert((slope * unit).sum(1), experts, len(offset))
    if by_batch:
        rows = per_expert(torch.full_like(x[:, 0], x.shape[1], dtype=acc), experts, len(offset))
        level, slant = (total / rows)[index].unsqueeze(1), (along / rows)[index].unsqueeze(1)
        grad_x = scale[index].unsqueeze(1) * (slope - level - unit * slant)
        nothing = torch.zeros_like(mean)
        of_inputs = nothing, nothing.clone(), nothing.clone()
    else:
        grad_x = scale[index].unsqueeze(1) * slope
        of_inputs = scale * total, -scale * total, -0.5 * scale * rstd * along
    return (
        grad_x.to(x.dtype),
        of_inputs[0].to(offset.dtype),
        along.to(weight.dtype),
        total.to(bias.dtype),
        *of_inputs[1:],
    )


def per_expert(
    values: Tensor, experts: Sequence[int], num_experts: int, *, average: bool = False
) -> Tensor:
    """Return the sum or the average of values (O, ...) over the outputs of every expert."""
    if len(experts) == num_experts:
        return values
    index = torch.tensor(list(experts), device=values.device)
    total = values.new_zeros(num_experts, *values.shape[1:]).index_add(0, index, values)
    if not average:
        return total
    numbers = torch.tensor([list(experts).count(e) for e in range(num_experts)])
    return total / numbers.to(total).view(-1, *(1,) * (values.ndim - 1))
