"""``norm_act`` in float32 on the CPU, an expert at a time by kernels of PyTorch; contiguous.

Rows of an expert are adjacent, so that its channels are those of an ordinary batch normalization,
and what is written by one kernel is still in the cache for the next.
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from core_gates.activations import ACTIVATIONS
from core_gates.ops.norm_act.reference import Gradients

_aten: Any = torch.ops.aten


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
    """Return the same as ``reference.forward``, computed one expert at a time."""
    activate, out = ACTIVATIONS[activation].value, torch.empty_like(x)
    if by_batch:
        shift, variance = torch.empty_like(offset), torch.empty_like(offset)
    else:
        shift, variance = mean - offset, variance.clone()
    for (e, rows), (_, result) in zip(_slices(x, experts), _slices(out, experts), strict=True):
        if by_batch:
            shift[e], variance[e] = torch.batch_norm_update_stats(rows, None, None, 0.0)
        activate(_normalized(rows, weight[e], bias[e], shift[e], variance[e], eps), out=result)
    return out, shift + offset if by_batch else mean.clone(), variance


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
    """Return the same gradients as ``reference.backward``, computed one expert at a time."""
    grad_x, slope_of = torch.empty_like(x), ACTIVATIONS[activation].gradient
    of_weight, of_bias = torch.empty_like(weight), torch.empty_like(bias)
    shift, rstd = mean - offset, (variance + eps).rsqrt()
    parts = zip(*(_slices(t, experts) for t in (x, grad, grad_x)), strict=True)
    for (e, rows), (_, outer), (_, result) in parts:
        z = _normalized(rows, weight[e], bias[e], shift[e], variance[e], eps)
        slope = slope_of(outer, z, out=z)
        # In training it takes the statistics after the running ones, in evaluation those.
        gradients = _aten.native_batch_norm_backward(
            slope,
            rows,
            weight[e],
            shift[e],
            variance[e],
            shift[e],
            rstd[e],
            by_batch,
            eps,
            [True, True, True],
        )
        result.copy_(gradients[0])
        of_weight[e], of_bias[e] = gradients[1:]
    if by_batch:
        of_inputs = (torch.zeros_like(mean) for _ in range(3))
    else:
        scale = weight * rstd
        of_inputs = (
            t for t in (scale * of_bias, -scale * of_bias, -0.5 * scale * rstd * of_weight)
        )
    of_offset, of_mean, of_variance = of_inputs
    return grad_x, of_offset, of_weight, of_bias, of_mean, of_variance


def _normalized(
    rows: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float
) -> Tensor:
    normalized = torch.native_batch_norm(rows, weight, bias, mean, variance, False, 0.0, eps)
    return cast(Tensor, normalized[0])


def _slices(x: Tensor, experts: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """Iterate over the experts and their rows, those of all outputs of an expert together."""
    start = 0
    while start < len(experts):
        end = start
        while end < len(experts) and experts[end] == experts[start]:
            end += 1
        yield experts[start], x[start:end].flatten(0, 1)
        start = end
