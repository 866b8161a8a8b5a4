"""Ways to lay rows out for experts and to combine what they return."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from core_gates.moe.experts import StackedExperts
from core_gates.ops._select import is_transformed
from core_gates.routing.capacity import count_non_finite, refuse_non_finite
from core_gates.routing.output import RoutingOutput

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


CHOICES_OF_A_STEP = 8
"""Up to this many choices, a pass without gradients does not sort them."""

Dispatch = Literal["dense", "loop", "sorted", "capacity"]


class Experts(Protocol):
    """What a layer needs of its experts; `core_gates.moe.experts.StackedExperts` has it."""

    num_experts: int

    def run(
        self,
        rows: Tensor,
        counts: Tensor,
        *,
        gather: Tensor | None = None,
        non_finite: Tensor | None = None,
    ) -> Tensor:
        """Apply each expert to its ``counts`` consecutive rows.

        Experts that bring the counts to the host refuse a number ``non_finite`` () that is not 0.
        """

    def batched(self, x: Tensor, *, used: Tensor | None = None) -> Tensor:
        """Apply each expert to its part of (E, C, D); results that are not ``used`` may be any."""

    def dense(self, x: Tensor, *, used: Tensor | None = None) -> Tensor:
        """Apply all experts to (T, D), giving (T, E, D); ``used`` is (T, E)."""

    def single(self, x: Tensor, expert: int) -> Tensor:
        """Apply one expert to (N, D)."""


class FlatChoices(NamedTuple):
    """Experts of T tokens, K choices each; weights are zero where a choice is not kept."""

    weights: Tensor
    indices: Tensor
    kept: Tensor | None


class Plan(NamedTuple):
    """Choices sorted by expert, those that are not kept last.

    Attributes:
        order: Number of the choice at each sorted place (T K,).
        place: Sorted place of each choice (T, K).
        counts: Kept choices of every expert (E,).
    """

    order: Tensor
    place: Tensor
    counts: Tensor


def dispatch(x: Tensor, routing: RoutingOutput, experts: Experts, how: Dispatch) -> Tensor:
    """Return the weighted sum of the experts that each token is routed to.

    Args:
        x: Tokens (..., D).
        routing: Routing of the same leading shape, of choices, dense weights or slots.
        experts: The experts.
        how: One of ``dense``, ``loop``, ``sorted`` and ``capacity``; slots know one way only.
            ``torch.export`` and the transforms of ``torch.func`` always get ``dense``, whose shapes
            do not depend on the routing.

    Returns:
        Results (..., D) in the dtype of the experts' results; zero for tokens without expert.

    Raises:
        GatesError: A weight is not finite, where a count reaches the host anyway: the dispatch
            ``capacity``, experts of several ranks, choices of dense weights.
        ValueError: The leading shapes differ.
    """
    leading = routing.weights.shape[: -1 if routing.dispatch is None else -2]
    if x.shape[:-1] != leading:
        raise ValueError(f"x {tuple(x.shape)} does not fit a routing of {tuple(leading)} tokens")
    if routing.dispatch is not None:
        return _slots(x, routing, experts)
    if torch.compiler.is_exporting() or is_transformed():
        how = "dense"
    y = _WAYS[how](x.reshape(-1, x.shape[-1]), routing, experts)
    return y if x.ndim == 2 else y.view(x.shape)


def choices(routing: RoutingOutput) -> FlatChoices:
    """Return the choices of a routing, flat; dense weights become choices of the non-zero ones."""
    if routing.indices is None:
        routing = _chosen(routing)
    assert routing.indices is not None
    k = routing.indices.shape[-1]
    weights, kept = routing.weights.reshape(-1, k), routing.kept
    if kept is not None:
        kept = kept.reshape(-1, k)
        weights = weights.masked_fill(~kept, 0)
    return FlatChoices(weights, routing.indices.reshape(-1, k), kept)


def plan(chosen: FlatChoices, num_experts: int) -> Plan:
    """Sort the choices by expert; within one, they stay in order."""
    flat = chosen.indices.flatten()
    if chosen.kept is not None:
        flat = torch.where(chosen.kept.flatten(), flat, num_experts)
    order = flat.argsort(stable=True)
    place = torch.empty_like(order).scatter(0, order, torch.arange(len(flat), device=flat.device))
    counts = flat.new_zeros(num_experts + 1).scatter_add(0, flat, torch.ones_like(flat))
    return Plan(order, place.view_as(chosen.indices), counts[:num_experts])


def _sorted(x: Tensor, routing: RoutingOutput, experts: Experts) -> Tensor:
    chosen = choices(routing)
    if isinstance(experts, StackedExperts) and _is_step(chosen):
        out = experts.chosen(x, chosen.indices, used=chosen.kept)
        return (out * chosen.weights.unsqueeze(-1)).sum(-2).to(out.dtype)
    order, place, counts = plan(chosen, experts.num_experts)
    k = chosen.indices.shape[1]
    gather = torch.div(order, k, rounding_mode="floor")
    reads = not isinstance(experts, StackedExperts)
    non_finite = count_non_finite(chosen.weights) if reads else None
    rows = experts.run(x, counts, gather=gather, non_finite=non_finite)
    return combine(rows, chosen.weights, place, order)


def _is_step(chosen: FlatChoices) -> bool:
    """Return whether this is a step of generation, where only reading the weights takes time."""
    if torch.is_grad_enabled() or not 0 < chosen.indices.numel() <= CHOICES_OF_A_STEP:
        return False
    return torch.compiler.is_compiling() or chosen.indices.is_cpu


def _capacity(x: Tensor, routing: RoutingOutput, experts: Experts) -> Tensor:
    chosen = choices(routing)
    _, place, counts = plan(chosen, experts.num_experts)
    largest, bad = torch.stack([counts.max(), count_non_finite(chosen.weights)]).tolist()
    refuse_non_finite(bad)
    longest = max(largest, 1)
    flat, k = chosen.indices.flatten(), chosen.indices.shape[1]
    slot = flat * longest + place.flatten() - (counts.cumsum(0) - counts)[flat]
    num_slots = experts.num_experts * longest
    if chosen.kept is not None:
        slot = torch.where(chosen.kept.flatten(), slot, num_slots)
    token = torch.div(torch.arange(len(flat), device=x.device), k, rounding_mode="floor")
    source = slot.new_full((num_slots + 1,), x.shape[0]).scatter(0, slot, token)[:num_slots]
    padded = torch.cat([x, x.new_zeros(1, x.shape[1])])
    buffer = padded.index_select(0, source).view(experts.num_experts, longest, -1)
    used = (source < x.shape[0]).view(experts.num_experts, longest)
    rows = experts.batched(buffer, used=used).flatten(0, 1)
    slot = slot.clamp(max=num_slots - 1).view_as(place)  # any slot will do for a zero weight
    return combine(rows, chosen.weights, slot)


def _dense(x: Tensor, routing: RoutingOutput, experts: Experts) -> Tensor:
    if routing.indices is None:
        weights = routing.weights.reshape(-1, experts.num_experts)
        used = weights != 0
        weights = torch.where(used, weights, 0)  # no gradient where nothing is routed
    else:
        chosen = choices(routing)
        zeros = chosen.weights.new_zeros(x.shape[0], experts.num_experts)
        weights = zeros.scatter_add(-1, chosen.indices, chosen.weights)
        kept = torch.ones_like(chosen.weights) if chosen.kept is None else chosen.kept.to(zeros)
        used = zeros.scatter_add(-1, chosen.indices, kept) != 0
    out = experts.dense(torch.where(used.any(-1, keepdim=True), x, 0), used=used)
    exact = torch.promote_types(out.dtype, weights.dtype)
    return torch.einsum("te,ted->td", weights.to(exact), out.to(exact)).to(out.dtype)


def _loop(x: Tensor, routing: RoutingOutput, experts: Experts) -> Tensor:
    weights, indices, kept = choices(routing)
    y = x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, weights.dtype))
    dtype = x.dtype
    for expert in range(experts.num_experts):
        mine = indices == expert if kept is None else (indices == expert) & kept
        token, choice = mine.nonzero(as_tuple=True)
        out = experts.single(x[token], expert)
        dtype = out.dtype
        y = y.index_add(0, token, (weights[token, choice].unsqueeze(-1) * out).to(y.dtype))
    return y.to(dtype)


def _slots(x: Tensor, routing: RoutingOutput, experts: Experts) -> Tensor:
    """Mix tokens into slots, apply the experts, mix back (Puigcerver et al., 2024)."""
    assert routing.dispatch is not None
    exact = torch.promote_types(x.dtype, routing.weights.dtype)
    inputs = torch.einsum("...tes,...td->...esd", routing.dispatch.to(exact), x.to(exact))
    by_expert = inputs.to(x.dtype).movedim(-3, 0)  # (E, ..., S, D)
    out = experts.batched(by_expert.reshape(experts.num_experts, -1, x.shape[-1]))
    out = out.view(by_expert.shape).movedim(0, -3)
    y = torch.einsum("...tes,...esd->...td", routing.weights.to(exact), out.to(exact))
    return y.to(out.dtype)


def _chosen(routing: RoutingOutput) -> RoutingOutput:
    """Return dense weights as choices, as many as the token with the most experts has."""
    weights = routing.weights
    num_experts = weights.shape[-1]
    if not torch.compiler.is_compiling() and weights.numel():
        most = (weights.detach() != 0).sum(-1).max()
        active, bad = torch.stack([most, count_non_finite(weights)]).tolist()
        refuse_non_finite(bad)
        if active <= num_experts // 2:
            return routing.to_top_k(max(active, 1))
    indices = torch.arange(num_experts, device=weights.device).expand(weights.shape)
    return routing._replace(indices=indices, kept=weights != 0)


_WAYS: dict[Dispatch, Callable[[Tensor, RoutingOutput, Experts], Tensor]] = {
    "dense": _dense,
    "loop": _loop,
    "sorted": _sorted,
    "capacity": _capacity,
}
DISPATCHES: tuple[Dispatch, ...] = tuple(_WAYS)
