"""Which implementation of an op runs, and how ops with kernels are registered."""

import functools
import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import CustomOpDef, custom_op
from torch.nn import Parameter

from core_gates.errors import MissingExtraError, check_option

KernelMode = Literal["reference", "compile", "triton", "cpp"]
MODES: tuple[KernelMode, ...] = get_args(KernelMode)
ENVIRONMENT_VARIABLE = "CORE_GATES_KERNELS"

F = TypeVar("F", bound=Callable[..., object])


def _checked(mode: str, source: str) -> KernelMode:
    check_option(source, mode, MODES)
    return cast(KernelMode, mode)


_HAS_TRITON = importlib.util.find_spec("triton") is not None  # found, not imported
# A plain module variable: Dynamo cannot trace a ContextVar but guards on this.
_mode: KernelMode = _checked(
    os.environ.get(ENVIRONMENT_VARIABLE) or "reference", ENVIRONMENT_VARIABLE
)


@contextmanager
def kernels(mode: KernelMode) -> Iterator[None]:
    """Choose how the ops of this package are computed inside the ``with`` block.

    The choice holds for the whole process and is made when an op is called; a backward pass follows
    its forward pass. Outside any block the environment variable ``CORE_GATES_KERNELS`` decides,
    which is read at import.

    Args:
        mode: ``reference`` (the default) runs the definition; ``compile`` runs it through a cached
            ``torch.compile``; ``triton`` runs the hand-written kernel on CUDA tensors. The kernel
            is never used for float64 or on other devices, where ``triton`` means ``reference``.
            ``cpp`` runs C++ on float32 tensors of the CPU, compiled by the system's compiler at
            the first call; other tensors, and ops without such a kernel, are computed by the
            definition, and matmuls of stacked layers by oneDNN where it is faster. Second
            derivatives exist in ``reference`` mode only, and for stacked experts in float64 only.

    Raises:
        ValueError: ``mode`` is not one of the four.
    """
    global _mode
    previous, _mode = _mode, _checked(mode, "mode")
    try:
        yield
    finally:
        _mode = previous


def use_kernel(*tensors: Tensor) -> bool:
    """Return whether the Triton kernel computes an op of these tensors.

    Raises:
        MissingExtraError: The kernel was asked for on CUDA tensors and Triton is not installed.
    """
    if _mode != "triton":
        return False
    if not all(t.is_cuda and t.dtype != torch.float64 for t in tensors):
        return False
    if not _HAS_TRITON:
        raise MissingExtraError("gpu", "triton")
    return True


def use_cpp(*tensors: Tensor) -> bool:
    """Return whether the C++ kernel computes an op of these tensors, which must be plain ones."""
    if _mode != "cpp" or torch.jit.is_tracing():  # type: ignore[no-untyped-call]
        return False
    plain = all(type(t) in (Tensor, Parameter) for t in tensors)
    return plain and all(t.is_cpu and t.dtype == torch.float32 for t in tensors)


def use_slices(*tensors: Tensor) -> bool:
    """Return whether an op of these tensors is computed piece by piece in the cache of a CPU core.

    For float32 on the CPU; the definition, which is written without regard for memory, is left to
    other dtypes, devices, transforms and compilers.
    """
    if _mode not in ("reference", "cpp") or torch.compiler.is_compiling() or is_transformed():
        return False
    if torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"):  # type: ignore[no-untyped-call]
        return False
    plain = all(type(t) in (Tensor, Parameter) for t in tensors)
    return plain and all(t.is_cpu and t.dtype == torch.float32 for t in tensors)


def derivatives(
    definition: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    options: Sequence[Any],
    grad: Tensor,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of a definition's inputs, differentiable again.

    For a backward pass that is recorded itself (``create_graph``).
    """
    with torch.enable_grad():
        out = definition(*inputs, *options)
        wanted = [t for t in inputs if t.requires_grad]
        gradients = iter(
            torch.autograd.grad(out, wanted, grad, create_graph=True, allow_unused=True)
        )
    return tuple(next(gradients) if t.requires_grad else None for t in inputs)


def is_transformed() -> bool:
    """Return whether ``torch.func.grad``, ``vmap``, ``jvp`` or the like runs this call."""
    if torch.compiler.is_compiling():  # which traces the transform itself
        return False
    return torch._C._are_functorch_transforms_active() or in_forward_mode()


def in_forward_mode() -> bool:
    """Return whether tangents flow along, which no kernel and no registered operator carries."""
    return forward_ad._current_level >= 0


def definition(reference: F) -> F:
    """Return the reference function, compiled (once per function) where the mode asks for it.

    Inside a region that is itself being compiled the plain function is returned: the outer
    compilation fuses it.
    """
    if _mode != "compile" or torch.compiler.is_compiling():
        return reference
    return cast(F, _compiled(reference))


@functools.cache
def _compiled(reference: Callable[..., object]) -> Callable[..., object]:
    return torch.compile(reference)


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
        buffers = tuple(map(torch.empty_like, arguments[num_grads : num_grads + saved]))
        return buffers if saved > 1 else buffers[0]

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
        ctx.save_for_backward(*inputs[:saved])
        ctx.options = inputs[saved:]

    def differentiate(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradients = backward(*grads, *ctx.saved_tensors, *ctx.options)
        gradients = gradients if isinstance(gradients, tuple) else (gradients,)
        return (*gradients, *[None] * (num_inputs - len(gradients)))

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
