"""The public function ``norm_act``."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from core_gates.activations import check_activation
from core_gates.numerics import accumulation_dtype
from core_gates.ops._select import (
    definition,
    derivatives,
    register_direction,
    use_cpp,
    use_kernel,
    use_slices,
)
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
    if x.numel() and use_slices(*tensors):
        return _sliced(*tensors, *options)
    function = _forward if use_kernel(*tensors) else definition(reference.forward)
    y, mean, variance = function(*tensors, *options)
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
            gradients = derivatives(_output, tensors, ctx.options, grad)
        else:
            parts = grad.contiguous(), *tensors[:4], *statistics
            gradients = ctx.module.backward(*parts, *ctx.options)
        gradients = (*gradients[:4], None, None) if ctx.options[3] else gradients
        return *gradients, None, None, None, None


_sliced: Callable[..., tuple[Tensor, Tensor, Tensor]] = _Sliced.apply


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    offset, mean = rest[0], rest[3]
    acc = accumulation_dtype(x, mean)
    used = [offset.new_empty(offset.shape, dtype=acc) for _ in range(2)]
    return x.new_empty(x.shape), used[0], used[1]


def _fake_backward(_grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), *(torch.empty_like(t) for t in rest[:5])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], *output[1:])
    ctx.options = inputs[6:]
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor) -> Any:
    gradients = _backward(grad, *ctx.saved_tensors, *ctx.options)
    return (
        *gradients[:4],
        *((None, None) if ctx.options[3] else gradients[4:]),
        None,
        None,
        None,
        None,
    )


_forward = register_direction(reference, "forward", _fake)
_backward = register_direction(reference, "backward", _fake_backward)
_forward.register_autograd(_differentiate, setup_context=_save)
