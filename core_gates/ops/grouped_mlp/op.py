"""``grouped_mlp`` group by group: what is between the two maps of a group stays in the cache.

The definition writes the hidden values of all rows to memory and reads them again, forwards and
backwards. Here the values before the activation are all that is kept, for training alone; the
activation is computed once more in the backward pass, and buffers are as long as the longest group.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.library import custom_op

from core_gates.activations import activate, activation_gradient, check_activation
from core_gates.numerics import autocast_dtype
from core_gates.ops._select import is_transformed
from core_gates.ops.grouped_linear.segments import FEW_ROWS
from core_gates.ops.grouped_mlp import reference


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
            for gradient in grads[1:]:
                gradient[group : group + 1] = 0
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


def grouped_mlp(
    x: Tensor,
    first: Tensor,
    down: Tensor,
    counts: Tensor,
    *,
    first_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    gated: bool = False,
    gather: Tensor | None = None,
) -> Tensor:
    """Return ``act(row @ first[e].T + bias) @ down[e].T + bias`` for the rows of every group e.

    Groups, ``counts``, ``gather``, ``gated`` and autocast are those of
    `core_gates.ops.grouped_linear.op.grouped_linear`, which computes both maps on CUDA, in
    float64 and for few rows. Elsewhere the maps of a group follow each other, so that its hidden
    values stay in the cache. Second derivatives exist in float64 only.

    Args:
        x: Rows (M, D).
        first: Weights (E, F, D), or (E, 2F, D) if gated.
        down: Weights (E, D', F).
        counts: Rows of every group (E,), int64; their sum is at most N.
        first_bias: Biases (E, F), or (E, 2F).
        down_bias: Biases (E, D').
        activation: ``identity``, ``relu``, ``silu``, ``gelu`` or ``gelu_tanh``.
        gated: Whether the hidden values are ``act(first half) * second half``.
        gather: Row of ``x`` that each row of a group reads (N,), int64; N = M without it.

    Returns:
        Rows (N, D').

    Raises:
        ValueError: Shapes do not fit, or the activation is unknown.
    """
    check_activation(activation)
    operands = (x, first, down, first_bias, down_bias)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)
    num_rows = x.shape[0] if gather is None else gather.shape[0]
    few = not keep and num_rows <= FEW_ROWS * first.shape[0]
    if x.device.type != "cpu" or x.dtype == torch.float64 or few or is_transformed():
        return reference.forward(
            x, first, down, counts, first_bias, down_bias, gather, activation, gated
        )
    _check(x, first, down, counts, first_bias, down_bias, gather, gated)
    if dtype := autocast_dtype(x):
        x, first, down = x.to(dtype), first.to(dtype), down.to(dtype)
        first_bias = None if first_bias is None else first_bias.to(dtype)
        down_bias = None if down_bias is None else down_bias.to(dtype)
    arguments = (x, first, down, counts, first_bias, down_bias, gather, activation, gated, keep)
    if keep or torch.compiler.is_compiling():
        return cast(Tensor, _forward(*arguments)[0])
    return forward(*arguments)[0]


def _check(
    x: Tensor,
    first: Tensor,
    down: Tensor,
    counts: Tensor,
    first_bias: Tensor | None,
    down_bias: Tensor | None,
    gather: Tensor | None,
    gated: bool,
) -> None:
    if x.ndim != 2 or first.ndim != 3 or down.ndim != 3 or x.shape[1] != first.shape[2]:
        raise ValueError(
            f"x {tuple(x.shape)} must be (M, D), first {tuple(first.shape)} (E, F, D) and down"
            f" {tuple(down.shape)} (E, D, F)"
        )
    groups, width = first.shape[:2]
    if gated and width % 2:
        raise ValueError(f"gated weights need an even number of features, got {width}")
    hidden = width // 2 if gated else width
    if (down.shape[0], down.shape[2]) != (groups, hidden):
        raise ValueError(f"down {tuple(down.shape)} must have the shape ({groups}, D, {hidden})")
    shapes = {
        "counts": (counts, (groups,)),
        "first_bias": (first_bias, (groups, width)),
        "down_bias": (down_bias, tuple(down.shape[:2])),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} {tuple(tensor.shape)} must have the shape {shape}")
    if gather is not None and gather.ndim != 1:
        raise ValueError(f"gather {tuple(gather.shape)} must have one dimension")


def _run(
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
    """Return the result and, if they are kept, the values before the activation."""
    return forward(x, first, down, counts, first_bias, down_bias, gather, activation, gated, keep)


def _run_backward(
    grad: Tensor,
    x: Tensor,
    first: Tensor,
    down: Tensor,
    counts: Tensor,
    gather: Tensor | None,
    kept: Tensor,
    activation: str,
    gated: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, both weights and both biases, empty where not needed."""
    wanted = (needs[0], needs[1], needs[2], needs[3], needs[4])
    return backward(grad, x, first, down, counts, gather, kept, activation, gated, wanted)


_forward = custom_op("core_gates::grouped_mlp", _run, mutates_args=())
_backward = custom_op("core_gates::grouped_mlp_backward", _run_backward, mutates_args=())


@_forward.register_fake
def _(
    x: Tensor,
    first: Tensor,
    down: Tensor,
    _counts: Tensor,
    _first_bias: Tensor | None,
    _down_bias: Tensor | None,
    gather: Tensor | None,
    _activation: str,
    _gated: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    num_rows = x.shape[0] if gather is None else gather.shape[0]
    out = x.new_empty(num_rows, down.shape[1])
    return out, x.new_empty(num_rows if keep else 0, first.shape[1])


@_backward.register_fake
def _(
    _grad: Tensor,
    x: Tensor,
    first: Tensor,
    down: Tensor,
    _counts: Tensor,
    _gather: Tensor | None,
    _kept: Tensor,
    _activation: str,
    _gated: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shapes = (x.shape, first.shape, down.shape, first.shape[:2], down.shape[:2])
    gradients = [x.new_empty(s if n else (0,)) for s, n in zip(shapes, needs, strict=True)]
    return gradients[0], gradients[1], gradients[2], gradients[3], gradients[4]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, first, down, counts, _, _, gather, ctx.activation, ctx.gated, _ = inputs
    ctx.save_for_backward(x, first, down, counts, gather, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Any) -> Any:
    x, first, down, counts, gather, kept = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 4, 5)]
    saved = (x, first, down, counts, gather, kept, ctx.activation, ctx.gated)
    gradients = _backward(grad, *saved, needs)
    grads = [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
    return grads[0], grads[1], grads[2], None, grads[3], grads[4], None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
