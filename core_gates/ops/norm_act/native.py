"""``norm_act`` in C++ for float32 on the CPU; same results as ``reference.py``."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from core_gates.ops._native import library, run_rows
from core_gates.ops.norm_act.reference import Gradients

SOURCE = Path(__file__).with_name("kernel.cpp")
BLOCK_ELEMENTS = 2**16
"""Elements of a block of rows, which stay in the second cache of a core."""

KINDS = {"identity": 0, "relu": 1, "silu": 2}


def possible(activation: str) -> bool:
    """Return whether the kernel has this activation."""
    return activation in KINDS


def forward(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    experts: Sequence[int],
    activation: str,
    eps: float,
    by_batch: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same as ``reference.forward``, by the compiled kernel."""
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    if by_batch:
        shift, variance = torch.empty_like(offset), torch.empty_like(offset)
        sums = x.new_empty(_blocks(x), 2, x.shape[2])
        _run("moments", [x, sums], x)
        _run_experts("gather", [sums, _firsts(experts, len(offset)), shift, variance], x)
    else:
        shift, variance = mean - offset, variance.clone()
    scale = weight * (variance + eps).rsqrt()
    affine = [_per_output(t, experts) for t in (scale, bias - shift * scale)]
    _run("apply", [x, *affine, out, KINDS[activation]], x)
    return out, shift + offset if by_batch else mean.clone(), variance


def backward(
    grad: Tensor,
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    experts: Sequence[int],
    activation: str,
    eps: float,
    by_batch: bool,
) -> Gradients:
    """Return the same gradients as ``reference.backward``, by the compiled kernel."""
    grad, x = grad.contiguous(), x.contiguous()
    shift, rstd = mean - offset, (variance + eps).rsqrt()
    grad_x, sums = torch.empty_like(x), x.new_empty(_blocks(x), 2, x.shape[2])
    affine = _per_output(torch.stack([shift, rstd, weight, bias], 1), experts)
    _run("slopes", [grad, x, affine, grad_x, sums, KINDS[activation]], x)
    total, along, firsts = (
        *(torch.empty_like(weight) for _ in range(2)),
        _firsts(experts, len(mean)),
    )
    _run_experts("add", [sums, firsts, total, along], x)
    scale = weight * rstd
    if by_batch:
        rows = (firsts.diff() * x.shape[1]).unsqueeze(1)
        slant = scale * rstd * along / rows
        factors = torch.stack([scale, scale * total / rows - slant * shift, slant], 1)
        of_inputs = [torch.zeros_like(mean) for _ in range(3)]
    else:
        factors = torch.stack([scale, torch.zeros_like(scale), torch.zeros_like(scale)], 1)
        of_inputs = [scale * total, -scale * total, -0.5 * scale * rstd * along]
    _run("center", [x, _per_output(factors, experts), grad_x], x)
    return grad_x, of_inputs[0], along, total, of_inputs[1], of_inputs[2]


def _run(name: str, arguments: list[object], x: Tensor) -> None:
    """Run a function on all blocks of rows: in some calls for every thread, or in one."""
    blocks, threads = _blocks(x), torch.get_num_threads()
    chunk = -(-blocks // (4 * threads)) if threads > 1 else blocks
    run_rows(getattr(library(SOURCE), name), [*arguments, *_sizes(x)], blocks, max(chunk, 1))


def _run_experts(name: str, arguments: list[Tensor], x: Tensor) -> None:
    """Run a function on all experts."""
    number = len(arguments[-1])
    run_rows(getattr(library(SOURCE), name), [*arguments, *_sizes(x)], number, max(number, 1))


def _blocks(x: Tensor) -> int:
    """Return the number of blocks of rows, of all outputs."""
    rows, _, block = _sizes(x)
    return len(x) * -(-rows // block)


def _sizes(x: Tensor) -> list[int]:
    """Return rows, channels, and rows of a block."""
    return [x.shape[1], x.shape[2], max(1, BLOCK_ELEMENTS // max(x.shape[2], 1))]


def _firsts(experts: Sequence[int], num_experts: int) -> Tensor:
    """Return the first output of every expert, and the number of outputs (E + 1,)."""
    firsts = [o for o, e in enumerate(experts) if o == 0 or experts[o - 1] != e]
    assert len(firsts) == num_experts
    return torch.tensor([*firsts, len(experts)], device="cpu")


def _per_output(values: Tensor, experts: Sequence[int]) -> Tensor:
    """Return the values (E, ...) of the expert of every output (O, ...)."""
    return values.contiguous() if len(values) == len(experts) else values[list(experts)]
