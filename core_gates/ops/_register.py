"""Registration of a definition and its Triton kernel as PyTorch operators."""

import importlib
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef, custom_op


def register(
    reference: ModuleType,
    fake: Callable[..., Any],
    fake_backward: Callable[..., Any] | None = None,
    *,
    saved: int,
) -> CustomOpDef:
    """Register ``forward`` and ``backward`` of an op as differentiable operators.

    ``forward`` takes tensors, then options; ``backward`` takes the gradients of the results, the
    tensors that are saved and the options, and returns the gradients of the first inputs.

    Args:
        reference: The module ``reference`` of the op, next to which lies its module ``kernel``.
        fake: ``forward`` without data, which returns empty tensors of the right layout.
        fake_backward: The same for ``backward``; one like each of the saved tensors if None.
        saved: Number of tensors, the first inputs, that ``backward`` reads.

    Returns:
        The operator of ``forward``.
    """
    num_inputs = len(inspect.signature(reference.forward).parameters)
    num_grads = len(inspect.signature(reference.backward).parameters) - num_inputs

    def like_saved(*arguments: Any) -> Any:
        found = tuple(map(torch.empty_like, arguments[num_grads : num_grads + saved]))
        return found if saved > 1 else found[0]

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
        ctx.save_for_backward(*inputs[:saved])
        ctx.options = inputs[saved:]

    def differentiate(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found = backward(*grads, *ctx.saved_tensors, *ctx.options)
        found = found if isinstance(found, tuple) else (found,)
        return (*found, *[None] * (num_inputs - len(found)))

    forward = register_direction(reference, "forward", fake)
    backward = register_direction(reference, "backward", fake_backward or like_saved)
    forward.register_autograd(differentiate, setup_context=save)
    return forward


def register_direction(
    reference: ModuleType, direction: str, fake: Callable[..., Any]
) -> CustomOpDef:
    """Register ``forward`` or ``backward`` of an op, on CUDA that of its module ``kernel``."""
    package = reference.__name__.rpartition(".")[0]
    root, _, op = package.partition(".ops.")
    suffix = "" if direction == "forward" else f"_{direction}"
    operator: CustomOpDef = custom_op(
        f"{root}::{op}{suffix}", getattr(reference, direction), mutates_args=()
    )

    def launch(*arguments: Any) -> Any:
        kernel = importlib.import_module(f"{package}.kernel")  # the only place that needs Triton
        return getattr(kernel, direction)(*arguments)

    operator.register_kernel("cuda")(launch)
    operator.register_fake(fake)
    return operator
