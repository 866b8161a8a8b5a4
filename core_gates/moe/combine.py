"""The weighted sum of the results of the experts of a token."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from core_gates.ops._select import is_transformed

CHUNK = 256
"""Rows at a time whose gradient stays in the cache until all is done with it."""


def combine(rows: Tensor, weights: Tensor, place: Tensor, order: Tensor | None = None) -> Tensor:
    """Return ``Σ_k weights[t, k] rows[place[t, k]]``, multiplied in the wider of the two dtypes.

    Reading the rows where they are is deterministic, unlike adding them up where they belong. The
    plain formula, which ``torch.compile`` fuses, is also what ``torch.func`` transforms.

    Args:
        rows: Results (N, D).
        weights: Weights (T, K).
        place: Row of each choice (T, K), int64.
        order: Choice (t K + k) of each row (N,), where every row is that of exactly one choice; its
            gradient is then written where it belongs, without adding up.

    Returns:
        Sums (T, D) in the dtype of ``rows``.
    """
    if torch.compiler.is_compiling() or is_transformed():
        exact = torch.promote_types(rows.dtype, weights.dtype)
        return (rows[place].to(exact) * weights.unsqueeze(-1)).sum(-2).to(rows.dtype)
    return cast(Tensor, _Combine.apply(rows, weights, place, order))  # type: ignore[no-untyped-call]


class _Combine(torch.autograd.Function):
    # Automatic differentiation would keep and write (T, K, D) several times.

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weights: Tensor, place: Tensor, order: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(rows, weights, place, order)
        if rows.dtype == weights.dtype == torch.float32 and rows.is_cpu and len(rows):
            return F.embedding_bag(place, rows, per_sample_weights=weights, mode="sum")
        exact = torch.promote_types(rows.dtype, weights.dtype)
        total = rows.new_zeros(place.shape[0], rows.shape[1], dtype=exact)
        for index, weight in zip(place.unbind(1), weights.unbind(1), strict=True):
            total += rows.index_select(0, index) * weight.unsqueeze(1)
        return total.to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        rows, weights, place, order = ctx.saved_tensors
        if order is not None and rows.is_cpu:
            needs = ctx.needs_input_grad
            return *_row_by_row(grad, rows, weights, place, order, needs), None, None
        grad_rows = grad_weights = None
        if ctx.needs_input_grad[0]:
            shares = (grad.unsqueeze(1) * weights.unsqueeze(2)).to(rows.dtype).flatten(0, 1)
            grad_rows = torch.zeros_like(rows).index_add(0, place.flatten(), shares)
        if ctx.needs_input_grad[1]:
            exact = torch.promote_types(rows.dtype, weights.dtype)
            dots = [
                (rows.index_select(0, index) * grad.to(exact)).sum(1) for index in place.unbind(1)
            ]
            grad_weights = torch.stack(dots, 1).to(weights.dtype)
        return grad_rows, grad_weights, None, None


def _row_by_row(
    grad: Tensor,
    rows: Tensor,
    weights: Tensor,
    place: Tensor,
    order: Tensor,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of rows and weights from that of the sums, in one pass over the rows."""
    exact = torch.promote_types(rows.dtype, weights.dtype)
    grad_rows = torch.empty_like(rows) if needs[0] else None
    dots = torch.empty(len(rows), dtype=weights.dtype, device=rows.device) if needs[1] else None
    position = torch.div(order, place.shape[1], rounding_mode="floor")
    scale = weights.flatten()[order].unsqueeze(1)
    for start in range(0, len(rows), CHUNK):
        part = slice(start, start + CHUNK)
        share = grad.index_select(0, position[part]).to(exact)
        if dots is not None:
            dots[part] = (rows[part] * share).sum(1)
        if grad_rows is not None:
            grad_rows[part] = share * scale[part]
    return grad_rows, None if dots is None else dots[place]
