"""Telling a forward pass from its repetition, so that nothing is counted twice."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.library import custom_op
from torch.utils.module_tracker import ModuleTracker

T = TypeVar("T")

_hidden: ContextVar[bool] = ContextVar("hidden", default=False)


@contextmanager
def unobserved() -> Iterator[None]:
    """Hide the forward passes inside the ``with`` block from counts, routings and monitors.

    For passes over tokens that another pass of the step counts, too.
    """
    token = _hidden.set(True)
    try:
        yield
    finally:
        _hidden.reset(token)


@contextmanager
def probing(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluate a module inside the ``with`` block without a trace of its calls.

    There are no gradients and all of it is in evaluation mode. Afterwards modes, buffers and random
    generators are as before, and no monitor counts the calls.

    Args:
        module: Any module.
        device: Where it computes.
    """
    modes = [(part, part.training) for part in module.modules()]
    places = [(p._buffers, name, b) for p, _ in modes for name, b in p._buffers.items()]
    devices = [device] if device.type == "cuda" else []
    try:
        for part, _ in modes:
            part.training = False
        for buffers, name, buffer in places:
            buffers[name] = None if buffer is None else buffer.clone()
        with torch.no_grad(), unobserved(), torch.random.fork_rng(devices):
            yield
    finally:
        for part, training in modes:
            part.training = training
        for buffers, name, buffer in places:
            buffers[name] = buffer


def in_backward() -> bool:
    """Return whether the backward pass is running, where activation checkpointing recomputes."""
    return bool(ModuleTracker().is_bw)


def is_repeated() -> bool:
    """Return whether this forward pass repeats another one, so that nothing may count it again.

    That is in the backward pass, where activation checkpointing recomputes, and in `unobserved`.
    It cannot be traced by ``torch.compile``: there, `accumulate` and `Gathered` ask
    for it when the graph runs.
    """
    return _hidden.get() or in_backward()


def accumulate(total: Tensor, amount: Tensor) -> None:
    """Add ``amount`` to ``total`` in place, unless this forward pass repeats another one.

    Inside ``torch.compile`` it is one op, which decides each time it runs. Transforms of
    ``torch.func`` allow no change of a tensor from outside: nothing is added there.

    Args:
        total: Sums of any shape.
        amount: What to add, of the same shape, dtype and device.
    """
    if torch.compiler.is_compiling():
        _accumulate(total, amount)
    elif not torch._C._functorch.is_functorch_wrapped_tensor(amount):
        _add_once(total, amount)


class Gathered(Generic[T]):
    """What forward passes append, in order, but not what a repetition appends.

    It is a linked list, because ``torch.compile`` guards on the length of any other one and would
    compile again each time it has grown.
    """

    def __init__(self) -> None:
        self._last: tuple[T, Tensor | None, object] | None = None

    def append(self, item: T, like: Tensor) -> None:
        """Append one item.

        Args:
            item: What to gather.
            like: Any tensor of the forward pass.
        """
        if torch.compiler.is_compiling():
            self._last = (item, _is_first(like.detach()), self._last)
        elif not is_repeated():
            self._last = (item, None, self._last)

    def items(self) -> list[T]:
        """Return all that was gathered so far."""
        latest_first: list[T] = []
        node = self._last
        while node is not None:
            item, first, node = node  # type: ignore[assignment]
            if first is None or bool(first):
                latest_first.append(item)
        return latest_first[::-1]


def _add_once(total: Tensor, amount: Tensor) -> None:
    if not is_repeated():
        total.add_(amount)


def _tell_first(like: Tensor) -> Tensor:  # noqa: ARG001
    return torch.tensor(not is_repeated())


_accumulate = custom_op("core_gates::accumulate", _add_once, mutates_args=("total",))
_is_first = custom_op("core_gates::is_first", _tell_first, mutates_args=())


@_accumulate.register_fake
def _(total: Tensor, amount: Tensor) -> None:
    """Nothing is returned."""


@_is_first.register_fake
def _(_like: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.bool, device="cpu")
