"""The public function ``smooth_step`` and its registration as a PyTorch operator."""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from core_gates.ops._select import definition, use_kernel
from core_gates.ops.smooth_step import reference


def smooth_step(z: Tensor, gamma: float) -> Tensor:
    """Return a cubic step that is exactly 0 or 1 outside a band (Hazimeh et al., 2020).

    For |z| < γ/2 the value is -2z³/γ³ + 3z/(2γ) + ½; the derivative is continuous, at most 3/(2γ),
    and exactly 0 outside the band.

    Args:
        z: Any shape and floating dtype.
        gamma: Width γ of the band.

    Returns:
        The step in the dtype of ``z``.

    Raises:
        ValueError: ``gamma`` is not positive.
    """
    check_gamma(gamma)
    return (_forward if use_kernel(z) else definition(reference.forward))(z, gamma)


def check_gamma(gamma: float) -> None:
    """Refuse a band without width.

    Raises:
        ValueError: ``gamma`` is not positive and finite.
    """
    if not 0 < gamma < float("inf"):
        raise ValueError(f"gamma must be positive and finite, got {gamma}")


_forward = custom_op("core_gates::smooth_step", reference.forward, mutates_args=())
_backward = custom_op("core_gates::smooth_step_backward", reference.backward, mutates_args=())


@_forward.register_kernel("cuda")
def _(z: Tensor, gamma: float) -> Tensor:
    from core_gates.ops.smooth_step import kernel  # the only place that needs Triton

    return kernel.forward(z, gamma)


@_backward.register_kernel("cuda")
def _(grad: Tensor, z: Tensor, gamma: float) -> Tensor:
    from core_gates.ops.smooth_step import kernel

    return kernel.backward(grad, z, gamma)


@_forward.register_fake
def _(z: Tensor, _gamma: float) -> Tensor:
    return torch.empty_like(z)


@_backward.register_fake
def _(_grad: Tensor, z: Tensor, _gamma: float) -> Tensor:
    return torch.empty_like(z)


def _save(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:  # noqa: ARG001
    z, ctx.gamma = inputs
    ctx.save_for_backward(z)


def _differentiate(ctx: Any, grad: Tensor) -> Any:
    return _backward(grad, *ctx.saved_tensors, ctx.gamma), None


_forward.register_autograd(_differentiate, setup_context=_save)
