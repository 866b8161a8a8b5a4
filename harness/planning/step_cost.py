"""Arithmetic and memory of a training step on the meta device: nothing is computed."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode


class Work(NamedTuple):
    """What one row costs.

    Attributes:
        forward: Floating-point operations of the forward pass, a multiplication and an addition
            counted as two; those of matmuls, convolutions and attention only.
        training: Of forward and backward pass.
        saved: Bytes that the forward pass keeps for the backward pass, in the dtypes of the run.
    """

    forward: float
    training: float
    saved: float


def count_weights(module: nn.Module, tables: Iterable[Tensor] = ()) -> tuple[int, int]:
    """Return the number of weights outside and inside of tables; shared ones count once."""
    inside = {id(table): table.numel() for table in tables}
    outside = {id(p): p.numel() for p in module.parameters() if id(p) not in inside}
    return sum(outside.values()), sum(inside.values())


def count_work(
    forward: Callable[[int], Tensor], *, batch_size: int = 64, parameters: Iterable[Tensor] = ()
) -> Work:
    """Count the work of a row, as the difference of two batch sizes: constants do not count.

    Args:
        forward: Runs a module on made-up rows, that many, and returns its output (rows, ...).
        batch_size: Rows; the other batch has twice as many.
        parameters: Their memory is not that of activations.
    """
    known = {_storage(parameter) for parameter in parameters}
    small, large = (_run(forward, n, known) for n in (batch_size, 2 * batch_size))
    return Work(*((b - a) / batch_size for a, b in zip(small, large, strict=True)))


def _run(forward: Callable[[int], Tensor], rows: int, known: set[int]) -> Work:
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in known:
            saved.setdefault(_storage(tensor), tensor)
        return tensor

    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            output = forward(rows)
        ahead = counter.get_total_flops()
        output.sum().backward()
    kept = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    return Work(ahead, counter.get_total_flops(), kept)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class StepCost(NamedTuple):
    """What a step costs, weights and optimizer aside.

    Attributes:
        forward: Floating-point operations of the forward pass, a multiplication and an addition
            counted as two; those of matmuls, convolutions and attention only.
        training: Of forward and backward pass, with what is computed again in it.
        activations: Largest number of bytes in use at once, without gradients of weights.
        with_gradients: The same with the gradients of weights that exist at that time.
        inference: Largest number of bytes in use at once in a forward pass without gradients.
    """

    forward: int
    training: int
    activations: int
    with_gradients: int
    inference: int


class MemoryTrace(TorchDispatchMode):
    """Follow the memory of all tensors that operators return, until they are freed.

    What an operator allocates for itself alone is not seen.

    Args:
        known: Tensors whose memory does not count, such as weights and inputs.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self._known = {_address(tensor) for tensor in known}
        self._serial = itertools.count()
        self._live: dict[int, int] = {}  # address of a storage -> its number
        self._changes: list[tuple[int, int]] = []  # number of a storage, bytes

    def __torch_dispatch__(
        self,
        func: Any,
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operator and note what it returns."""
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._note, result)
        return result

    def number(self, tensor: Tensor) -> int | None:
        """Return the number of the memory of a tensor, None if it does not count."""
        return self._live.get(_address(tensor))

    def peak(self, without: Collection[int] = ()) -> int:
        """Return the largest number of bytes in use at once.

        Args:
            without: Numbers of memory that does not count.
        """
        now = most = 0
        for number, size in self._changes:
            if number not in without:
                now += size
                most = max(most, now)
        return most

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        address = _address(tensor)
        if address not in self._known and address not in self._live:
            number, size = next(self._serial), storage.nbytes()
            self._live[address] = number
            self._changes.append((number, size))
            weakref.finalize(storage, self._free, address, number, size)
        return tensor

    def _free(self, address: int, number: int, size: int) -> None:
        self._live.pop(address, None)
        self._changes.append((number, -size))


def cost_of_step(
    loss: Callable[[], Tensor], parameters: Iterable[Tensor], inputs: Iterable[Tensor] = ()
) -> StepCost:
    """Count a forward and a backward pass, each tensor while it is in use.

    Args:
        loss: Runs the forward pass and returns a scalar.
        parameters: Weights; their gradients are set to None before and after.
        inputs: What the forward pass is given.
    """
    weights = list(parameters)
    known = [*weights, *inputs]
    for weight in weights:
        weight.grad = None
    with torch.no_grad(), MemoryTrace(known) as alone:
        loss()
    with (
        torch.enable_grad(),
        FlopCounterMode(display=False) as counter,
        MemoryTrace(known) as trace,
    ):
        value = loss()
        forward = counter.get_total_flops()
        value.backward()
        del value
    gradients = {trace.number(w.grad) for w in weights if w.grad is not None} - {None}
    activations, most = trace.peak(gradients), trace.peak()  # type: ignore[arg-type]
    for weight in weights:
        weight.grad = None
    return StepCost(forward, counter.get_total_flops(), activations, most, alone.peak())


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
