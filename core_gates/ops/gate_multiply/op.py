"""The public function ``gate_multiply`` and its registration as a PyTorch operator."""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from core_gates.ops._select import definition, use_kernel
from core_gates.ops.gate_multiply import reference


def gate_multiply(x: Tensor, logits: Tensor) -> Tensor:
    """Return ``x * sigmoid(logits)``, fused where a kernel is chosen.

    Args:
        x: Values to gate, any shape.
        logits: Gate logits of the same shape; the dtype may differ.

    Returns:
        The gated values in the dtype of ``x``.

    Raises:
        ValueError: The shapes differ.
    """
    if x.shape != logits.shape:
        raise ValueError(f"x {tuple(x.shape)} and logits {tuple(logits.shape)} must have one shape")
    return (_forward if use_kernel(x, logits) else definition(reference.forward))(x, logits)


_forward = custom_op("core_gates::gate_multiply", reference.forward, mutates_args=())
_backward = custom_op("core_gates::gate_multiply_backward", reference.backward, mutates_args=())


@_forward.register_kernel("cuda")
def _(x: Tensor, logits: Tensor) -> Tensor:
    from core_gates.ops.gate_multiply import kernel  # the only place that needs Triton

    return kernel.forward(x, logits)


@_backward.register_kernel("cuda")
def _(grad: Tensor, x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    from core_gates.ops.gate_multiply import kernel

    return kernel.backward(grad, x, logits)


@_forward.register_fake
def _(x: Tensor, _logits: Tensor) -> Tensor:
    return torch.empty_like(x)


@_backward.register_fake
def _(_grad: Tensor, x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(logits)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> Any:
    return _backward(grad, *ctx.saved_tensors)


_forward.register_autograd(_differentiate, setup_context=_save)
