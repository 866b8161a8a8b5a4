"""The public function ``soft_threshold`` and its registration as a PyTorch operator."""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from core_gates.ops._select import definition, use_kernel
from core_gates.ops.soft_threshold import reference


def soft_threshold(x: Tensor, threshold: float) -> Tensor:
    """Move every value towards zero by ``threshold`` and stop there.

    This is the proximal map of ``threshold * |x|_1``, so after a gradient step it solves the L1
    problem; values within the threshold become exactly zero (Ding et al., 2023, equation of SoRA).

    Args:
        x: Values, any shape.
        threshold: ξ, not negative.

    Returns:
        ``sign(x) max(|x| - ξ, 0)`` in the shape and dtype of ``x``.

    Raises:
        ValueError: The threshold is negative or NaN.
    """
    if not threshold >= 0:
        raise ValueError(f"threshold must not be negative, got {threshold}")
    function = _forward if use_kernel(x) else definition(reference.forward)
    return function(x, threshold)


_forward = custom_op("core_gates::soft_threshold", reference.forward, mutates_args=())
_backward = custom_op("core_gates::soft_threshold_backward", reference.backward, mutates_args=())


@_forward.register_kernel("cuda")
def _(x: Tensor, threshold: float) -> Tensor:
    from core_gates.ops.soft_threshold import kernel  # the only place that needs Triton

    return kernel.forward(x, threshold)


@_backward.register_kernel("cuda")
def _(grad: Tensor, x: Tensor, threshold: float) -> Tensor:
    from core_gates.ops.soft_threshold import kernel

    return kernel.backward(grad, x, threshold)


@_forward.register_fake
def _(x: Tensor, _threshold: float) -> Tensor:
    return torch.empty_like(x)


@_backward.register_fake
def _(_grad: Tensor, x: Tensor, _threshold: float) -> Tensor:
    return torch.empty_like(x)


def _save(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(inputs[0])
    ctx.threshold = inputs[1]


def _differentiate(ctx: Any, grad: Tensor) -> Any:
    (x,) = ctx.saved_tensors
    return _backward(grad, x, ctx.threshold), None


_forward.register_autograd(_differentiate, setup_context=_save)
