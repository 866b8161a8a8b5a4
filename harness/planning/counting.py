"""Arithmetic and memory of a training step, counted on the meta device: nothing is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
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
