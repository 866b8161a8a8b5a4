"""``grouped_linear`` by one matmul per group, written where the result belongs.

The definition copies every part once more: into the joined rows and, in its backward pass, into the
stacked gradient of the weights. Here each matmul writes straight to its place.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from core_gates.activations import activate, activation_gradient

_CAPABILITIES: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
WEIGHT_FIRST = not str(_CAPABILITIES.get("cpu_name", "")).startswith("Intel")
"""Whether a matmul of few rows reads the weight faster as its left factor.

MKL does on AMD (AVX2), by a half; on Intel (AVX-512) it is twice as slow that way.
"""

FEW_ROWS = 4
"""With this many rows per group on average, only reading the weights takes time."""


def forward(
    x: Tensor,
    weight: Tensor,
    counts: Tensor,
    bias: Tensor | None,
    gather: Tensor | None,
    scatter: Tensor | None,
    activation: str,
    gated: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Return the result, and the values before the activation if they are to be kept."""
    num_rows = x.shape[0] if gather is None else gather.shape[0]
    width = weight.shape[1]
    if not keep and num_rows <= FEW_ROWS * weight.shape[0]:
        z = _few_rows(_rows(x, gather, slice(None)), weight, counts, bias)
        out = activate(z, activation, gated)
        out = out if scatter is None else torch.empty_like(out).index_copy_(0, scatter, out)
        return out, z.new_empty(0, width)
    out = _empty((num_rows, width // 2 if gated else width), x)
    plain = activation == "identity" and not gated
    kept = _empty((num_rows if keep and not plain else 0, width), x)
    start = 0
    for group, size in enumerate(counts.tolist()):
        if size == 0:
            continue
        part = slice(start, start + size)
        target = out[part] if plain else kept[part] if keep else None
        score = _product(_rows(x, gather, part), weight[group], target)
        if bias is not None:
            score += bias[group]
        if not plain:
            out[part] = activate(score, activation, gated)
        start += size
    out[start:] = 0
    kept[start:] = 0
    if scatter is not None:
        out = torch.empty_like(out).index_copy_(0, scatter, out)
    return out, kept


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    counts: Tensor,
    gather: Tensor | None,
    scatter: Tensor | None,
    kept: Tensor,
    activation: str,
    gated: bool,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias; empty where they are not needed."""
    grad_x = _empty(x.shape if needs_x else (0,), x)
    if gather is not None:
        grad_x.zero_()  # rows are added
    grad_weight = _empty(weight.shape if needs_weight else (0,), weight)
    grad_bias = weight.new_zeros(weight.shape[:2] if needs_bias else (0,))
    start = 0
    for group, size in enumerate(counts.tolist()):
        part = slice(start, start + size)
        start += size
        if size == 0:
            grad_weight[group : group + 1] = 0
            continue
        outer = _rows(grad, scatter, part)
        if activation != "identity" or gated:
            outer = activation_gradient(outer, kept[part], activation, gated)
        if needs_weight:
            torch.mm(outer.t(), _rows(x, gather, part), out=grad_weight[group])
        if needs_bias:
            torch.sum(outer, 0, out=grad_bias[group])
        if needs_x and gather is None:
            torch.mm(outer, weight[group], out=grad_x[part])
        elif needs_x and gather is not None:
            grad_x.index_add_(0, gather[part], outer @ weight[group])
    if gather is None:
        grad_x[start:] = 0
    return grad_x, grad_weight, grad_bias


def _empty(shape: Sequence[int], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def _rows(x: Tensor, index: Tensor | None, part: slice) -> Tensor:
    return x[part] if index is None else x.index_select(0, index[part])


def _product(rows: Tensor, weight: Tensor, out: Tensor | None) -> Tensor:
    return torch.mm(rows, weight.t()) if out is None else torch.mm(rows, weight.t(), out=out)


def _few_rows(rows: Tensor, weight: Tensor, counts: Tensor, bias: Tensor | None) -> Tensor:
    """Return the values before the activation where only the weights take time.

    With the weight as the left factor two rows are faster than one: an odd part takes in a
    neighbor, whose result is not used.
    """
    num_rows = rows.shape[0]
    z = _empty((num_rows, weight.shape[1]), rows)
    start = 0
    for group, size in enumerate(counts.tolist()):
        if size == 0:
            continue
        end = start + size
        if size > FEW_ROWS or not WEIGHT_FIRST:
            torch.mm(rows[start:end], weight[group].t(), out=z[start:end])
        else:
            odd = size % 2
            first = start - 1 if odd and end == num_rows and start > 0 else start
            product = torch.mm(weight[group], rows[first : first + size + odd].t())
            z[start:end] = product[:, start - first : end - first].t()
        if bias is not None:
            z[start:end] += bias[group]
        start = end
    z[start:] = 0
    return z
