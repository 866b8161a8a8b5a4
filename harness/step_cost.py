"""What a training step costs: its arithmetic, and the memory of each tensor while it is in use."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode


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

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._known = {_address(tensor) for tensor in tensors}
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


class FlashAttention(TorchFunctionMode):
    """Compute attention without a mask on the meta device by the operator of fused kernels.

    There PyTorch falls back to matmuls that keep all probabilities, which GPUs never have at once.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run a function, attention by another operator."""
        named = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            attention_options = {
                name: named[name] for name in ("is_causal", "scale") if name in named
            }
            if len(args) == 3 and all(
                named[name] in (None, 0, False) for name in named.keys() - attention_options
            ):
                return torch.ops.aten._scaled_dot_product_flash_attention(
                    *args, **attention_options
                )[0]
        return func(*args, **named)


def cost_of_step(
    loss: Callable[[], Tensor], parameters: Iterable[Tensor], inputs: Iterable[Tensor] = ()
) -> StepCost:
    """Count a forward and a backward pass, each tensor while it is in use.

    On the meta device, attention without a mask is that of fused kernels (`FlashAttention`).

    Args:
        loss: Runs the forward pass and returns a scalar.
        parameters: Weights; their gradients are set to None before and after.
        inputs: What the forward pass is given.
    """
    weights = list(parameters)
    held = [*weights, *inputs]
    for weight in weights:
        weight.grad = None
    with torch.no_grad(), FlashAttention(), MemoryTrace(held) as alone:
        loss()
    with (
        torch.enable_grad(),
        FlashAttention(),
        FlopCounterMode(display=False) as counter,
        MemoryTrace(held) as trace,
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
