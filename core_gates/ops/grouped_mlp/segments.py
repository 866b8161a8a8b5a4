"""``grouped_mlp`` group by group: what is between the two maps of a group stays in the cache.

The definition writes the hidden values of all rows to memory and reads them again, forwards and
backwards. Here the values before the activation are all that is kept, for training alone; the
activation is computed once more in the backward pass, and buffers are as long as the longest group.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from core_gates.activations import activate, activation_gradient


def forward(
    x: Tensor,
    first: Tensor,
    down: Tensor,
    counts: Tensor,
    first_bias: Tensor | None,
    down_bias: Tensor | None,
    gather: Tensor | None,
    activation: str,
    gated: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Return the result, and the values before the activation if they are to be kept."""
    num_rows = x.shape[0] if gather is None else gather.shape[0]
    sizes = counts.tolist()
    longest, used = max(sizes, default=0), sum(sizes)
    if used > num_rows:
        raise ValueError(f"counts are those of {used} rows, but there are {num_rows}")
    out = _empty((num_rows, down.shape[1]), x)
    kept = _empty((num_rows if keep else 0, first.shape[1]), x)
    scores = kept if keep else _empty((longest, first.shape[1]), x)
    hidden = _empty((longest, down.shape[2]), x)
    rows = _empty((longest if gather is not None else 0, x.shape[1]), x)
    start = 0
    for group, size in enumerate(sizes):
        part = slice(start, start + size)
        start += size
        if size == 0:
            continue
        score = scores[part] if keep else scores[:size]
        torch.mm(_rows(x, gather, part, rows), first[group].t(), out=score)
        if first_bias is not None:
            score += first_bias[group]
        activate(score, activation, gated, out=hidden[:size])
        torch.mm(hidden[:size], down[group].t(), out=out[part])
        if down_bias is not None:
            out[part] += down_bias[group]
    out[used:] = 0
    kept[used:] = 0
    return out, kept


def backward(
    grad: Tensor,
    x: Tensor,
    first: Tensor,
    down: Tensor,
    counts: Tensor,
    gather: Tensor | None,
    kept: Tensor,
    activation: str,
    gated: bool,
    needs: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, the weights and their biases; empty where they are not needed."""
    sizes = counts.tolist()
    longest, used = max(sizes, default=0), sum(sizes)
    shapes = (x.shape, first.shape, down.shape, first.shape[:2], down.shape[:2])
    grads = tuple(_empty(s if n else (0,), x) for s, n in zip(shapes, needs, strict=True))
    grad_x, grad_first, grad_down, grad_first_bias, grad_down_bias = grads
    needs_x, needs_first, needs_down, needs_first_bias, needs_down_bias = needs
    if gather is not None:
        grad_x.zero_()  # rows are added
    hidden = _empty((longest, down.shape[2]), x)
    inner = _empty((longest, first.shape[1]), x)
    rows = _empty((longest if gather is not None else 0, x.shape[1]), x)
    start = 0
    for group, size in enumerate(sizes):
        part = slice(start, start + size)
        start += size
        if size == 0:
            for one in grads[1:]:
                one[group : group + 1] = 0
            continue
        outer, score, middle = grad[part], kept[part], hidden[:size]
        if needs_down:
            activate(score, activation, gated, out=middle)
            torch.mm(outer.t(), middle, out=grad_down[group])
        if needs_down_bias:
            torch.sum(outer, 0, out=grad_down_bias[group])
        if not (needs_x or needs_first or needs_first_bias):
            continue
        torch.mm(outer, down[group], out=middle)
        steep = activation_gradient(middle, score, activation, gated, out=inner[:size])
        if needs_first:
            torch.mm(steep.t(), _rows(x, gather, part, rows), out=grad_first[group])
        if needs_first_bias:
            torch.sum(steep, 0, out=grad_first_bias[group])
        if needs_x and gather is None:
            torch.mm(steep, first[group], out=grad_x[part])
        elif needs_x and gather is not None:
            torch.mm(steep, first[group], out=rows[:size])
            grad_x.index_add_(0, gather[part], rows[:size])
    if gather is None:
        grad_x[used:] = 0
    return grad_x, grad_first, grad_down, grad_first_bias, grad_down_bias


def _empty(shape: Sequence[int], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def _rows(x: Tensor, gather: Tensor | None, part: slice, buffer: Tensor) -> Tensor:
    if gather is None:
        return x[part]
    index = gather[part]
    return torch.index_select(x, 0, index, out=buffer[: len(index)])
