"""The choice between an op's definition, its compiled definition and its Triton kernel."""

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, TypeVar, cast, get_args

import torch
from torch import Tensor

from core_gates.errors import MissingExtraError

Mode = Literal["reference", "compile", "triton"]
MODES: tuple[Mode, ...] = get_args(Mode)
ENVIRONMENT_VARIABLE = "CORE_GATES_KERNELS"

F = TypeVar("F", bound=Callable[..., object])


def _checked(mode: str, source: str) -> Mode:
    if mode not in MODES:
        raise ValueError(f"{source} is {mode!r}; choose one of {', '.join(MODES)}")
    return mode


_DEFAULT = _checked(os.environ.get(ENVIRONMENT_VARIABLE) or "reference", ENVIRONMENT_VARIABLE)
_mode: ContextVar[Mode] = ContextVar("core_gates_kernels", default=_DEFAULT)


@contextmanager
def kernels(mode: Mode) -> Iterator[None]:
    """Choose how the ops of this package are computed inside the ``with`` block.

    The choice is made when an op is called; the backward pass follows its forward pass. Outside any
    block the environment variable ``CORE_GATES_KERNELS`` decides, which is read at import.

    Args:
        mode: ``reference`` (the default) runs the definition; ``compile`` runs it through a cached
            ``torch.compile``; ``triton`` runs the hand-written kernel on CUDA tensors. The kernel
            is never used for float64 or on other devices, where ``triton`` means ``reference``.

    Raises:
        ValueError: ``mode`` is not one of the three.
    """
    token = _mode.set(_checked(mode, "mode"))
    try:
        yield
    finally:
        _mode.reset(token)


def use_kernel(*tensors: Tensor) -> bool:
    """Tell whether the Triton kernel computes an op of these tensors.

    Raises:
        MissingExtraError: The kernel was asked for on CUDA tensors and Triton is not installed.
    """
    if _mode.get() != "triton":
        return False
    if not all(t.is_cuda and t.dtype != torch.float64 for t in tensors):
        return False
    if not _has_triton():
        raise MissingExtraError("gpu", "triton")
    return True


def definition(reference: F) -> F:
    """Return the reference function, compiled (once per function) where the mode asks for it."""
    return _compiled(reference) if _mode.get() == "compile" else reference


@functools.cache
def _compiled(reference: F) -> F:
    return cast(F, torch.compile(reference))


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
