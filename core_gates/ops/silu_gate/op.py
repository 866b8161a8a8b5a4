"""The public function ``silu_gate`` and its registration as a PyTorch operator."""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from core_gates.ops._select import definition, use_kernel
from core_gates.ops.silu_gate import reference


def silu_gate(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Gate an activated signal and return it with the gate, fused where a kernel is chosen.

    The gated convolution needs both: ``o = silu(a) * sigmoid(g)`` is its output stream and
    ``sigmoid(g)`` its next confidence stream. Both results are differentiable.

    Args:
        a: Signal before its activation, any shape.
        g: Gate logits of the same shape; the dtype may differ.

    Returns:
        ``silu(a) * sigmoid(g)`` in the dtype of ``a`` and ``sigmoid(g)`` in the dtype of ``g``.

    Raises:
        ValueError: The shapes differ.
    """
    if a.shape != g.shape:
        raise ValueError(f"a {tuple(a.shape)} and g {tuple(g.shape)} must have one shape")
    return (_forward if use_kernel(a, g) else definition(reference.forward))(a, g)


_forward = custom_op("core_gates::silu_gate", reference.forward, mutates_args=())
_backward = custom_op("core_gates::silu_gate_backward", reference.backward, mutates_args=())


@_forward.register_kernel("cuda")
def _(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    from core_gates.ops.silu_gate import kernel  # the only place that needs Triton

    return kernel.forward(a, g)


@_backward.register_kernel("cuda")
def _(grad_product: Tensor, grad_gate: Tensor, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    from core_gates.ops.silu_gate import kernel

    return kernel.backward(grad_product, grad_gate, a, g)


@_forward.register_fake
def _(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(a), torch.empty_like(g)


@_backward.register_fake
def _(_grad_product: Tensor, _grad_gate: Tensor, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(a), torch.empty_like(g)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Any) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad_product: Tensor, grad_gate: Tensor) -> Any:
    return _backward(grad_product, grad_gate, *ctx.saved_tensors)


_forward.register_autograd(_differentiate, setup_context=_save)
