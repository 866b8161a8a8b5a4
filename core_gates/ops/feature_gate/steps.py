"""The steps of ``feature_gate`` that multiply no matrices, in C++ for float32 on the CPU."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core_gates.ops._native import library, run_rows

_aten: Any = torch.ops.aten


class Steps:
    """The steps by kernels of PyTorch, with memory that blocks take one after the other.

    Attributes:
        cpp: Whether these are those of the C++ mode.
    """

    cpp = False

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def open(self, logits: Tensor, mixture: Tensor, v: Tensor, out: Tensor) -> None:
        """Write the rescaled inputs of the runs.

        Args:
            logits: Logits of all maps (k, L, n, D); overwritten.
            mixture: Twice the weights of the maps (k, L, n, 1), a part of a larger tensor.
            v: Rows of the input (n, D).
            out: Results (k, n, D).
        """
        factor = self._mixed(torch.sigmoid(logits, out=logits).sub_(0.5), mixture)
        torch.addcmul(v, v, factor, out=out)

    def differentiate(
        self,
        logits: Tensor,
        mixture: Tensor,
        v: Tensor,
        grad: Tensor,
        of_v: Tensor,
        of_mixture: Tensor,
        *,
        first: bool,
    ) -> Tensor:
        """Return the gradient of the logits (k, L, n, D).

        Args:
            logits: Logits of all maps (k, L, n, D); overwritten.
            mixture: Twice the weights of the maps (k, L, n, 1), a part of a larger tensor.
            v: Rows of the input (n, D).
            grad: Gradient of the results (k, n, D).
            of_v: Gradient of the input (n, D), to which that of these runs is added.
            of_mixture: Where that of ``mixture`` goes, a part of a tensor of the same layout.
            first: Whether these runs are the first: ``of_v`` is overwritten.
        """
        opened = torch.sigmoid(logits, out=logits)
        slope = torch.sub(opened, 0.5, out=self.memory("slope", opened.shape, v))
        factor = self._mixed(slope, mixture)
        _add_input_gradient(of_v, grad, factor, first=first)
        of_factor = torch.mul(grad, v, out=factor).unsqueeze(1)
        torch.sum(slope.mul_(of_factor), -1, keepdim=True, out=of_mixture)
        torch.mul(mixture, of_factor, out=slope)
        result: Tensor = _aten.sigmoid_backward.grad_input(slope, opened, grad_input=slope)
        return result

    def memory(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """Return the memory of a name in some shape; it is made for the first, largest block."""
        size = 1
        for length in shape:
            size *= length
        if name not in self._memory or self._memory[name].numel() < size:
            self._memory[name] = like.new_empty(size)
        return self._memory[name][:size].view(tuple(shape))

    def _mixed(self, centered: Tensor, mixture: Tensor) -> Tensor:
        """Return the sum (k, n, D) of the maps (k, L, n, D), weighed by (k, L, n, 1)."""
        shape = len(centered), *centered.shape[2:]
        out = self.memory("factor", shape, centered)
        torch.mul(centered[:, 0], mixture[:, 0], out=out)
        for number in range(1, centered.shape[1]):
            out.addcmul_(centered[:, number], mixture[:, number])
        return out


def _add_input_gradient(of_v: Tensor, grad: Tensor, factor: Tensor, *, first: bool) -> None:
    """Add ``grad (1 + factor)`` of all runs to the gradient of their input; write the first."""
    if len(grad) == 1:
        grad, factor = grad[0], factor[0]
        if first:
            torch.addcmul(grad, grad, factor, out=of_v)
        else:
            of_v.add_(grad).addcmul_(grad, factor)
    else:
        total = torch.addcmul(grad, grad, factor).sum(0)
        of_v.copy_(total) if first else of_v.add_(total)


SOURCE = Path(__file__).with_name("kernel.cpp")
ROWS = 64
"""Rows of a call where there are threads."""


class NativeSteps(Steps):
    """The steps in C++: every value is read and written once."""

    cpp = True

    def open(self, logits: Tensor, mixture: Tensor, v: Tensor, out: Tensor) -> None:
        """Write the rescaled inputs of the runs, as :meth:`Steps.open` does."""
        tensors = [logits, *_parts(mixture), v, out]
        _run("open", tensors, [], logits, mixture)

    def differentiate(
        self,
        logits: Tensor,
        mixture: Tensor,
        v: Tensor,
        grad: Tensor,
        of_v: Tensor,
        of_mixture: Tensor,
        *,
        first: bool,
    ) -> Tensor:
        """Return the gradient of the logits, as :meth:`Steps.differentiate` does."""
        tensors = [logits, *_parts(mixture), v, grad, of_v, *_parts(of_mixture)]
        _run("differentiate", tensors, [int(first)], logits, mixture)
        return logits


def _parts(part: Tensor) -> list[Tensor]:
    """Return the memory from the first element of a part of a larger tensor on, flat."""
    size = part.untyped_storage().nbytes() // part.element_size() - part.storage_offset()
    return [part.as_strided((size,), (1,))]


def _run(
    name: str, tensors: list[Tensor], options: list[int], logits: Tensor, mixture: Tensor
) -> None:
    runs, maps, rows, dim = logits.shape
    arguments = [*tensors, *options, runs, maps, rows, dim, mixture.stride(1)]
    chunk = ROWS if torch.get_num_threads() > 1 else max(rows, 1)
    run_rows(getattr(library(SOURCE), name), arguments, rows, chunk)
