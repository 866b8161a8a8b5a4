"""The steps of ``feature_gate`` that multiply no matrices, in C++ for float32 on the CPU."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core_gates.ops._native import add_products, library, product, products, run_rows
from core_gates.ops.feature_gate.reference import Gradients, runs_of

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
        """Write the rescaled inputs of the runs, as `Steps.open` does."""
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
        """Return the gradient of the logits, as `Steps.differentiate` does."""
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


BLOCK_ELEMENTS = 2**19
"""Logits of a block: some temporaries of this size stay in the second cache of a core."""


class Maps(NamedTuple):
    """What the gates that read an input make of it.

    Attributes:
        runs: Their runs (K).
        weight: First factors of all maps, then mixers, as one linear layer (K L (r + 1), D).
        hidden: Low-rank activations (K, L, N, r).
        mixture: Twice the weights of the maps (K, L, N, 1).
    """

    runs: list[int]
    weight: Tensor
    hidden: Tensor
    mixture: Tensor


class Block(NamedTuple):
    """Some runs, neighbors of each other, over some rows.

    Attributes:
        number: Position of the first of them among the runs of the input.
        runs: Which of all runs they are.
        gates: Their gates.
        rows: The rows.
    """

    number: slice
    runs: slice
    gates: slice
    rows: slice


def forward(
    v: Tensor,
    mixer: Tensor,
    mixer_bias: Tensor,
    down: Tensor,
    up: Tensor,
    inputs: Sequence[int],
    gates: Sequence[int],
    steps: Steps,
) -> tuple[Tensor, list[Maps]]:
    """Return gated inputs of all runs (R, N, D), and what the backward pass needs."""
    out = v.new_empty(len(inputs), *v.shape[1:])
    gate = mixer, mixer_bias, down
    maps = [_maps(v[i], *gate, runs_of(i, inputs), gates, steps) for i in range(len(v))]
    for x, group in zip(v, maps, strict=True):
        for block in _blocks(group.runs, gates, v, up):
            logits = _logits(group, up, block, steps)
            mixture = group.mixture[block.number, :, block.rows]
            steps.open(logits, mixture, x[block.rows], out[block.runs, block.rows])
    return out, maps


def backward(
    grad: Tensor,
    v: Tensor,
    down: Tensor,
    up: Tensor,
    gates: Sequence[int],
    maps: Sequence[Maps],
    steps: Steps,
) -> Gradients:
    """Return the gradients of v, mixer, mixer_bias, down and up, block by block."""
    of_v, of_up, of_down = torch.empty_like(v), torch.zeros_like(up), torch.zeros_like(down)
    of_mixer = v.new_zeros(*down.shape[:2], v.shape[2])
    of_bias = v.new_zeros(down.shape[:2])
    for i, group in enumerate(maps):
        sizes = group.hidden.shape  # (K, L, N, r)
        width = sizes[0] * sizes[1] * sizes[3]
        of_outputs = v.new_empty(sizes[2], len(group.weight))
        of_hidden = of_outputs[:, :width].view(sizes[2], *sizes[:2], sizes[3]).permute(1, 2, 0, 3)
        targets = of_v[i], of_hidden, of_up
        slope = _backward_of_runs(grad, v[i], up, gates, group, targets, steps)
        of_outputs[:, width:] = slope.flatten(0, 1).mT
        of_weight = product(of_outputs.mT, v[i], cpp=steps.cpp)
        add_products(of_v[i], of_outputs, group.weight, cpp=steps.cpp)
        mine = torch.tensor([gates[j] for j in group.runs])
        of_down.index_add_(0, mine, of_weight[:width].view(sizes[0], *down.shape[1:]))
        of_mixer.index_add_(0, mine, of_weight[width:].view(*sizes[:2], v.shape[2]))
        of_bias.index_add_(0, mine, slope.sum(2))
    return of_v, of_mixer, of_bias, of_down, of_up


def _backward_of_runs(
    grad: Tensor,
    v: Tensor,
    up: Tensor,
    gates: Sequence[int],
    maps: Maps,
    targets: tuple[Tensor, Tensor, Tensor],
    steps: Steps,
) -> Tensor:
    """Return the gradient of the logits of the mixture (K, L, N) of the runs over an input.

    Those of the input and of the hidden activations are written to the targets, that of the second
    factors is added.
    """
    of_v, of_hidden, of_up = targets
    of_mixture = torch.empty_like(maps.mixture)
    for block in _blocks(maps.runs, gates, v.unsqueeze(0), up):
        number, rows = block.number, block.rows
        slope = steps.differentiate(
            _logits(maps, up, block, steps),
            maps.mixture[number, :, rows],
            v[rows],
            grad[block.runs, rows],
            of_v[rows],
            of_mixture[number, :, rows],
            first=number.start == 0,
        )
        flat, factors = slope.flatten(0, 1), up[block.gates].flatten(0, 1)
        of_run = flat.new_empty(*flat.shape[:2], up.shape[2])
        products(flat, factors.mT, of_run, cpp=steps.cpp)
        of_hidden[number, :, rows] = of_run.view(*slope.shape[:3], up.shape[2])
        hidden = maps.hidden[number, :, rows].flatten(0, 1)
        add_products(of_up[block.gates].flatten(0, 1), hidden.mT, flat, cpp=steps.cpp)
    weights, slopes = (maps.mixture / 2).squeeze(-1), 2 * of_mixture.squeeze(-1)
    return weights * (slopes - (weights * slopes).sum(1, keepdim=True))


def _maps(
    v: Tensor,
    mixer: Tensor,
    mixer_bias: Tensor,
    down: Tensor,
    runs: list[int],
    gates: Sequence[int],
    steps: Steps,
) -> Maps:
    """Return the gate values of each run for its input (N, D)."""
    mine = [gates[j] for j in runs]
    weight = torch.cat([down[mine].flatten(0, 2), mixer[mine].flatten(0, 1)])
    outputs = product(v, weight.mT, cpp=steps.cpp)
    width = len(mine) * down.shape[1] * down.shape[2]
    hidden = outputs[:, :width].view(len(outputs), len(mine), *down.shape[1:3])
    hidden = hidden.permute(1, 2, 0, 3)
    logits = outputs[:, width:].mT.reshape(len(mine), down.shape[1], len(outputs))
    logits = logits + mixer_bias[mine].unsqueeze(-1)
    return Maps(runs, weight, hidden, 2 * logits.softmax(1).unsqueeze(-1))


def _logits(maps: Maps, up: Tensor, block: Block, steps: Steps) -> Tensor:
    """Return the logits of a block (k, L, n, D)."""
    hidden = maps.hidden[block.number, :, block.rows]
    out = steps.memory("logits", (*hidden.shape[:3], up.shape[3]), up)
    factors = up[block.gates].flatten(0, 1)
    products(hidden.flatten(0, 1), factors, out.flatten(0, 1), cpp=steps.cpp)
    return out


def _blocks(runs: Sequence[int], gates: Sequence[int], v: Tensor, up: Tensor) -> Iterator[Block]:
    """Divide the runs over an input: whole runs where they are small, else rows of one run."""
    num_rows, dim = v.shape[1:]
    of_run = up.shape[1] * num_rows * dim
    most = max(1, BLOCK_ELEMENTS // max(of_run, 1))
    rows = 1 << max(4, (BLOCK_ELEMENTS // (up.shape[1] * dim)).bit_length() - 1)
    start = 0
    while start < len(runs):
        end = start + 1
        while end < min(len(runs), start + most) and (
            runs[end] == runs[end - 1] + 1 and gates[runs[end]] == gates[runs[end - 1]] + 1
        ):
            end += 1
        first, gate = runs[start], gates[runs[start]]
        step = max(num_rows, 1) if end > start + 1 else rows
        for row in range(0, max(num_rows, 1), step):
            yield Block(
                slice(start, end),
                slice(first, first + end - start),
                slice(gate, gate + end - start),
                slice(row, row + step),
            )
        start = end
