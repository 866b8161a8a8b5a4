"""Linear layers of stacked experts, in groups that read an input each."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core_gates.ops._products import add_products, product, products
from core_gates.ops._select import derivatives, use_cpp, use_slices


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


def stacked_linear(
    x: Tensor, weight: Tensor, stretches: Sequence[Stretch], bias: Tensor | None = None
) -> Tensor:
    """Return ``W_e x_i + b_e`` (O, N, F) for every expert e and every input i of its group.

    Args:
        x: Inputs (I, N, D), those of a group next to each other.
        weight: Weights of the experts (E, F, D), those of a group next to each other.
        stretches: The groups.
        bias: Biases of the experts (E, F).

    Returns:
        Outputs, those of an expert next to each other.
    """
    bias = weight.new_zeros(len(weight), 0) if bias is None else bias
    if use_slices(x, weight, bias):
        return _sliced(x, weight, bias, list(stretches))
    return _define(x, weight, bias, stretches)


def _define(x: Tensor, weight: Tensor, bias: Tensor, stretches: Sequence[Stretch]) -> Tensor:
    outputs = []
    for part in _parts(x, weight, bias, stretches):
        groups, experts, runs = part.stretch
        rows = part.rows.view(groups, 1, runs * x.shape[1], x.shape[2])
        y = rows @ part.weight.view(groups, experts, *weight.shape[1:]).mT
        if bias.shape[1]:
            y = y + part.bias.view(groups, experts, 1, bias.shape[1])
        outputs.append(y.view(groups * experts * runs, x.shape[1], weight.shape[1]))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class _Part(NamedTuple):
    """A stretch with experts, its inputs (groups, runs N, D), weights and biases."""

    stretch: Stretch
    rows: Tensor
    weight: Tensor
    bias: Tensor


def _parts(
    x: Tensor, weight: Tensor, bias: Tensor, stretches: Sequence[Stretch]
) -> Iterator[_Part]:
    row = expert = 0
    for stretch in stretches:
        groups, experts, runs = stretch
        rows, row = x[row : row + groups * runs], row + groups * runs
        mine, expert = slice(expert, expert + groups * experts), expert + groups * experts
        if experts:
            rows = rows.reshape(groups, runs * x.shape[1], x.shape[2])
            yield _Part(stretch, rows, weight[mine], bias[mine])


def _outputs(y: Tensor, stretches: Sequence[Stretch]) -> Iterator[Tensor]:
    """Iterate over the stretches and their outputs (groups experts, runs N, F)."""
    start = 0
    for groups, experts, runs in stretches:
        end = start + groups * experts * runs
        if experts:
            yield y[start:end].view(groups * experts, runs * y.shape[1], y.shape[2])
        start = end


class _Sliced(torch.autograd.Function):
    """Every matmul writes to its part of the result."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, stretches: list[Stretch]
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.stretches, ctx.cpp = stretches, use_cpp(x, weight, bias)
        number = sum(groups * experts * runs for groups, experts, runs in stretches)
        out = x.new_empty(number, x.shape[1], weight.shape[1])
        parts = zip(_parts(x, weight, bias, stretches), _outputs(out, stretches), strict=True)
        for part, result in parts:
            if part.stretch.experts == 1:
                _multiply(part.rows, part.weight, part.bias, result, cpp=ctx.cpp)
                continue
            grouped = [_grouped(t, part.stretch) for t in (part.weight, part.bias, result)]
            for rows, *group in zip(part.rows, *grouped, strict=True):
                _multiply(rows.expand(part.stretch.experts, -1, -1), *group, cpp=ctx.cpp)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *derivatives(_define, (x, weight, bias), (ctx.stretches,), grad), None
        grad = grad.contiguous()
        idle = any(not stretch.experts for stretch in ctx.stretches)
        of_x = (torch.zeros_like if idle else torch.empty_like)(
            x, memory_format=torch.contiguous_format
        )
        of_weight, of_bias = torch.empty_like(weight), torch.empty_like(bias)
        parts = zip(
            _parts(x, weight, bias, ctx.stretches),
            _parts(of_x, of_weight, of_bias, ctx.stretches),
            _outputs(grad, ctx.stretches),
            strict=True,
        )
        for part, to, outer in parts:
            if bias.shape[1]:
                torch.sum(outer, 1, out=to.bias)
            if part.stretch.experts == 1:
                products(outer, part.weight, to.rows, cpp=ctx.cpp)
                products(outer.mT, part.rows, to.weight, cpp=ctx.cpp)
                continue
            grouped = [_grouped(t, part.stretch) for t in (part.weight, to.weight, outer)]
            for group in zip(part.rows, to.rows, *grouped, strict=True):
                _backward_of_group(*group, cpp=ctx.cpp)
        return of_x, of_weight, of_bias, None


def _multiply(rows: Tensor, weight: Tensor, bias: Tensor, out: Tensor, *, cpp: bool) -> None:
    """Write the outputs (E, N, F) of experts, each with its rows (E, N, D)."""
    products(rows, weight.mT, out, bias if bias.shape[1] else None, cpp=cpp)


def _backward_of_group(
    rows: Tensor, to_rows: Tensor, factors: Tensor, to_factors: Tensor, grad: Tensor, *, cpp: bool
) -> None:
    """Write the gradients of the input of a group and of the weights of its experts."""
    if cpp:
        to_rows.copy_(product(grad[0], factors[0], cpp=True))
    else:
        torch.mm(grad[0], factors[0], out=to_rows)
    for left, right in zip(grad[1:], factors[1:], strict=True):
        add_products(to_rows, left, right, cpp=cpp)
    products(grad.mT, rows.expand(len(factors), -1, -1), to_factors, cpp=cpp)


def _grouped(t: Tensor, stretch: Stretch) -> Tensor:
    return t.view(stretch.groups, stretch.experts, *t.shape[1:])


_sliced: Callable[..., Tensor] = _Sliced.apply
