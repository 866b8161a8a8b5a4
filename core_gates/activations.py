"""Activations: those of gates, and those of experts with their gradients."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from core_gates.errors import check_option

GateActivation = Literal["identity", "tanh", "sigmoid", "ns_sigmoid", "silu", "gelu"]
"""Activation of a gate; ``ns_sigmoid`` is ``0.5 + 0.5 sigmoid(z)``, which cannot close."""

GATE_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "ns_sigmoid": lambda z: 0.5 + 0.5 * torch.sigmoid(z),
    "silu": F.silu,
    "gelu": F.gelu,
}

_aten: Any = torch.ops.aten  # whose functions are not typed


class Activation(NamedTuple):
    """An element-wise function and its derivative times a gradient, both with ``out=``."""

    value: Callable[..., Tensor]
    gradient: Callable[..., Tensor]


def _identity(z: Tensor, *, out: Tensor | None = None) -> Tensor:
    return z if out is None else out.copy_(z)


def _relu(z: Tensor, *, out: Tensor | None = None) -> Tensor:
    return F.relu(z) if out is None else torch.clamp_min(z, 0, out=out)


def _silu(z: Tensor, *, out: Tensor | None = None) -> Tensor:
    return cast(Tensor, F.silu(z) if out is None else _aten.silu.out(z, out=out))


def _gelu(z: Tensor, *, approximate: str, out: Tensor | None = None) -> Tensor:
    how = {"approximate": approximate}
    return cast(Tensor, F.gelu(z, **how) if out is None else _aten.gelu.out(z, **how, out=out))


def _identity_gradient(grad: Tensor, _: Tensor, *, out: Tensor | None = None) -> Tensor:
    return grad if out is None else out.copy_(grad)


def _relu_gradient(grad: Tensor, z: Tensor, *, out: Tensor | None = None) -> Tensor:
    return cast(
        Tensor,
        _aten.threshold_backward(grad, z, 0)
        if out is None
        else _aten.threshold_backward.grad_input(grad, z, 0, grad_input=out),
    )


def _silu_gradient(grad: Tensor, z: Tensor, *, out: Tensor | None = None) -> Tensor:
    return cast(
        Tensor,
        _aten.silu_backward(grad, z)
        if out is None
        else _aten.silu_backward.grad_input(grad, z, grad_input=out),
    )


def _gelu_gradient(
    grad: Tensor, z: Tensor, *, approximate: str, out: Tensor | None = None
) -> Tensor:
    return cast(
        Tensor,
        _aten.gelu_backward(grad, z, approximate=approximate)
        if out is None
        else _aten.gelu_backward.grad_input(grad, z, approximate=approximate, grad_input=out),
    )


ACTIVATIONS = {
    "identity": Activation(_identity, _identity_gradient),
    "relu": Activation(_relu, _relu_gradient),
    "silu": Activation(_silu, _silu_gradient),
    "gelu": Activation(
        partial(_gelu, approximate="none"), partial(_gelu_gradient, approximate="none")
    ),
    "gelu_tanh": Activation(
        partial(_gelu, approximate="tanh"), partial(_gelu_gradient, approximate="tanh")
    ),
}


def check_activation(name: str) -> None:
    """Refuse what is not an activation of experts.

    Raises:
        ValueError: There is none of that name.
    """
    check_option("activation", name, ACTIVATIONS)


def activate(z: Tensor, name: str, gated: bool, *, out: Tensor | None = None) -> Tensor:
    """Return ``act(z)``, or ``act(first half) * second half`` of the features if gated."""
    value = ACTIVATIONS[name].value
    if not gated:
        return value(z, out=out)
    gate, up = z.chunk(2, -1)
    return torch.mul(value(gate, out=out), up, out=out)


def activation_gradient(
    grad: Tensor, z: Tensor, name: str, gated: bool, *, out: Tensor | None = None
) -> Tensor:
    """Return the gradient with respect to ``z``, given that of ``activate(z, name, gated)``."""
    activation = ACTIVATIONS[name]
    if not gated:
        return activation.gradient(grad, z, out=out)
    gate, up = z.chunk(2, -1)
    out = torch.empty_like(z) if out is None else out
    out_gate, out_up = out.chunk(2, -1)
    activation.gradient(torch.mul(grad, up, out=out_up), gate, out=out_gate)
    torch.mul(activation.value(gate, out=out_up), grad, out=out_up)
    return out
