"""Linear layers of stacked experts, in groups that read an input each."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core_gates.ops._select import derivatives, use_slices


class Stretch(NamedTuple):
    """Neighboring groups of as many experts each, with as many inputs each.

    Attributes:
        groups: Number of groups.
        experts: Experts of each.
        runs: Inputs of each.
    """

    groups: int
    experts: int
    runs: int


def stretches_of(counts: Sequence[int], runs: Sequence[int]) -> list[Stretch]:
    """Return groups, neighbors alike taken together.

    Args:
        counts: Experts of each group.
        runs: Inputs of each group.
    """
    found: list[Stretch] = []
    for experts, inputs in zip(counts, runs, strict=True):
        if found and found[-1][1:] == (experts, inputs):
            found[-1] = found[-1]._replace(groups=found[-1].groups + 1)
        else:
            found.append(Stretch(1, experts, inputs))
    return found


def stacked_linear(x: Tensor, weight: Tensor, stretches: Sequence[Stretch]) -> Tensor:
    """Return ``W_e x_i`` (O, N, F) for every expert e and every input i of its group.

    Args:
        x: Inputs (I, N, D), those of a group next to each other.
        weight: Weights of the experts (E, F, D), those of a group next to each other.
        stretches: The groups.

    Returns:
        Outputs, those of an expert next to each other.
    """
    if use_slices(x, weight):
        return _sliced(x, weight, list(stretches))
    return _define(x, weight, stretches)


def _define(x: Tensor, weight: Tensor, stretches: Sequence[Stretch]) -> Tensor:
    outputs = []
    for stretch, rows, factors in _parts(x, weight, stretches):
        if not stretch.experts:
            continue
        rows = rows.view(stretch.groups, 1, -1, x.shape[2])
        factors = factors.view(stretch.groups, stretch.experts, *weight.shape[1:])
        outputs.append((rows @ factors.mT).view(-1, x.shape[1], weight.shape[1]))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _parts(
    x: Tensor, weight: Tensor, stretches: Sequence[Stretch]
) -> Iterator[tuple[Stretch, Tensor, Tensor]]:
    """Iterate over the stretches, their inputs (groups, runs N, D) and their weights."""
    row = expert = 0
    for stretch in stretches:
        groups, experts, runs = stretch
        rows, row = x[row : row + groups * runs], row + groups * runs
        factors, expert = weight[expert : expert + groups * experts], expert + groups * experts
        yield stretch, rows.reshape(groups, runs * x.shape[1], x.shape[2]), factors


def _outputs(y: Tensor, stretches: Sequence[Stretch]) -> Iterator[Tensor]:
    """Iterate over the stretches and their outputs (groups experts, runs N, F)."""
    start = 0
    for groups, experts, runs in stretches:
        end = start + groups * experts * runs
        yield y[start:end].view(groups * experts, runs * y.shape[1], y.shape[2])
        start = end


class _Sliced(torch.autograd.Function):
    """Every matmul writes to its part of the result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stretches: list[Stretch]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stretches = stretches
        number = sum(groups * experts * runs for groups, experts, runs in stretches)
        out = x.new_empty(number, x.shape[1], weight.shape[1])
        parts = zip(_parts(x, weight, stretches), _outputs(out, stretches), strict=True)
        for (stretch, rows, factors), result in parts:
            if stretch.experts == 1:
                torch.bmm(rows, factors.mT, out=result)
                continue
            if not stretch.experts:
                continue
            groups = zip(rows, _grouped(factors, stretch), _grouped(result, stretch), strict=True)
            for one, others, target in groups:
                torch.bmm(one.expand(stretch.experts, -1, -1), others.mT, out=target)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *derivatives(_define, (x, weight), (ctx.stretches,), grad), None
        grad = grad.contiguous()
        of_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        of_weight = torch.empty_like(weight)
        parts = zip(
            _parts(x, weight, ctx.stretches),
            _parts(of_x, of_weight, ctx.stretches),
            _outputs(grad, ctx.stretches),
            strict=True,
        )
        for (stretch, rows, factors), (_, to_rows, to_factors), outer in parts:
            if not stretch.experts:
                to_rows.zero_()
            elif stretch.experts == 1:
                torch.bmm(outer, factors, out=to_rows)
                torch.bmm(outer.mT, rows, out=to_factors)
            else:
                grouped = [_grouped(t, stretch) for t in (factors, to_factors, outer)]
                for group in zip(rows, to_rows, *grouped, strict=True):
                    _backward_of_group(*group)
        return of_x, of_weight, None


def _backward_of_group(
    rows: Tensor, to_rows: Tensor, factors: Tensor, to_factors: Tensor, grad: Tensor
) -> None:
    """Write the gradients of the input of a group and of the weights of its experts."""
    torch.mm(grad[0], factors[0], out=to_rows)
    for left, right in zip(grad[1:], factors[1:], strict=True):
        to_rows.addmm_(left, right)
    torch.bmm(grad.mT, rows.expand(len(factors), -1, -1), out=to_factors)


def _grouped(t: Tensor, stretch: Stretch) -> Tensor:
    return t.view(stretch.groups, stretch.experts, *t.shape[1:])


_sliced: Callable[..., Tensor] = _Sliced.apply
