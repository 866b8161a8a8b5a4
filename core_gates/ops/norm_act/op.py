"""The public function ``norm_act``."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from core_gates.activations import check_activation
from core_gates.ops._select import definition, derivatives, use_cpp, use_slices
from core_gates.ops.norm_act import native, reference, slices

Statistics = tuple[Tensor, Tensor]


def norm_act(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: Statistics | None = None,
    *,
    experts: Sequence[int] | None = None,
    activation: str = "silu",
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize every channel of every expert, then apply an activation.

    ``act((x + offset - mean) / sqrt(variance + eps) * weight + bias)``: the seam of two layers of
    experts with batch normalization, bound by memory. The backward pass recomputes the normalized
    values. Where the statistics are those of the batch the offset, the bias of the layer before,
    cancels: it only moves the mean.

    Args:
        x: Outputs of linear layers (O, N, C), several next to each other for an expert that is
            applied to several inputs.
        offset: Added to ``x`` (E, C).
        weight: Factor of every channel (E, C).
        bias: Summand of every channel (E, C).
        statistics: Mean and variance (E, C), as in evaluation; if None those, biased, of the rows
            of all outputs of an expert.
        experts: Expert of every output, in ascending order; output e is that of expert e if None.
        activation: ``silu``, ``gelu``, ``gelu_tanh``, ``relu`` or ``identity``.
        eps: Added to the variance.

    Returns:
        The result (O, N, C) in the dtype of ``x``, and the mean and the variance (E, C) that were
        used, in float32 at least; these carry no gradient.

    Raises:
        ValueError: The shapes do not fit, there is no row whose statistics could be taken, or the
            activation is unknown.
    """
    experts = list(range(len(weight))) if experts is None else list(experts)
    _check(x, offset, weight, bias, statistics, experts)
    check_activation(activation)
    mean, variance = statistics or (weight, weight)
    tensors = x, offset, weight, bias, mean, variance
    options = experts, activation, float(eps), statistics is None
    if use_slices(*tensors):
        return _sliced(*tensors, *options)
    y, mean, variance = definition(reference.forward)(*tensors, *options)
    return y, mean.detach(), variance.detach()


def _check(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: Statistics | None,
    experts: Sequence[int],
) -> None:
    if x.ndim != 3 or weight.ndim != 2:
        raise ValueError(
            f"x {tuple(x.shape)} must be (outputs, rows, channels) and weight"
            f" {tuple(weight.shape)} (experts, channels)"
        )
    shape = (len(weight), x.shape[2])
    named = {"offset": offset, "weight": weight, "bias": bias}
    if statistics is not None:
        named |= {"mean": statistics[0], "variance": statistics[1]}
    for name, tensor in named.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} {tuple(tensor.shape)} must have the shape {shape}")
    if len(experts) != len(x) or sorted({*experts}) != list(range(shape[0])):
        raise ValueError(
            f"experts {experts} must name one of {shape[0]}, each at least once, for each of"
            f" {len(x)} outputs"
        )
    if list(experts) != sorted(experts):
        raise ValueError(f"experts {experts} must ascend: outputs of an expert are neighbors")
    if statistics is None and x.shape[1] == 0:
        raise ValueError("there is no row whose mean and variance could be taken")


def _output(*arguments: Any) -> Tensor:
    return reference.forward(*arguments)[0]


class _Sliced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        x = x.contiguous()
        cpp = use_cpp(x, *arguments[:5]) and native.possible(arguments[6])
        ctx.module = native if cpp else slices
        y, mean, variance = ctx.module.forward(x, *arguments)
        ctx.save_for_backward(x, *arguments[:5], mean, variance)
        ctx.options = arguments[5:]
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> Any:  # type: ignore[override]
        tensors, statistics = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
        if torch.is_grad_enabled():
            found = derivatives(_output, tensors, ctx.options, grad)
        else:
            parts = grad.contiguous(), *tensors[:4], *statistics
            found = ctx.module.backward(*parts, *ctx.options)
        found = (*found[:4], None, None) if ctx.options[3] else found
        return *found, None, None, None, None


_sliced: Callable[..., tuple[Tensor, Tensor, Tensor]] = _Sliced.apply
