"""The steps of ``feature_gate`` that multiply no matrices, in C++ for float32 on the CPU."""

from pathlib import Path

import torch
from torch import Tensor

from core_gates.ops._native import library, run_rows
from core_gates.ops.feature_gate.steps import Steps

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
