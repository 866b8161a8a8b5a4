"""Activations of an expert, their values and their gradients."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_aten = torch.ops.aten


class Activation(NamedTuple):
    """An element-wise function and its derivative times a gradient."""

    value: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS = {
    "identity": Activation(lambda z: z, lambda grad, _: grad),
    "relu": Activation(F.relu, lambda grad, z: _aten.threshold_backward(grad, z, 0)),
    "silu": Activation(F.silu, lambda grad, z: _aten.silu_backward(grad, z)),
    "gelu": Activation(F.gelu, lambda grad, z: _aten.gelu_backward(grad, z)),
    "gelu_tanh": Activation(
        lambda z: F.gelu(z, approximate="tanh"),
        lambda grad, z: _aten.gelu_backward(grad, z, approximate="tanh"),
    ),
}


def check_activation(name: str) -> None:
    """Refuse an unknown activation.

    Raises:
        ValueError: There is none of that name.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; choose one of {', '.join(ACTIVATIONS)}")


def activate(z: Tensor, name: str, gated: bool) -> Tensor:
    """Return ``act(z)``, or ``act(first half) * second half`` of the features if gated."""
    value = ACTIVATIONS[name].value
    if not gated:
        return value(z)
    gate, up = z.chunk(2, -1)
    return value(gate) * up


def activation_gradient(grad: Tensor, z: Tensor, name: str, gated: bool) -> Tensor:
    """Return the gradient with respect to ``z``, given that of ``activate(z, name, gated)``."""
    activation = ACTIVATIONS[name]
    if not gated:
        return activation.gradient(grad, z)
    gate, up = z.chunk(2, -1)
    out = torch.empty_like(z)
    out_gate, out_up = out.chunk(2, -1)
    out_gate.copy_(activation.gradient(grad * up, gate))
    torch.mul(activation.value(gate), grad, out=out_up)
    return out
