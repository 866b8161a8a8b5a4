"""Mixing by pairs of gate and expert in C++, for float32 on the CPU."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core_gates.ops._native import library, run_rows
from core_gates.ops._select import derivatives, use_cpp
from core_gates.ops.multi_gate_mix import reference

SOURCE = Path(__file__).with_name("kernel.cpp")
ROWS = 64
"""Rows of a call where there are threads."""


def native_mix(experts: Tensor, weights: Tensor, pairs: Tensor, out: Tensor) -> None:
    """Write the mixtures (S, N, D) of experts (E, N, D), given weights of pairs (P, N)."""
    _run("mix", [experts.contiguous(), weights, pairs, out], weights, out)


def native_differentiate(
    grad: Tensor, experts: Tensor, weights: Tensor, pairs: Tensor, of_experts: Tensor
) -> Tensor:
    """Return the gradient of the weights (P, N) and add that of the experts (E, N, D)."""
    of_weights = torch.empty_like(weights)
    tensors = [grad.contiguous(), experts.contiguous(), weights, pairs, of_experts, of_weights]
    _run("differentiate", tensors, weights, grad)
    return of_weights


def _run(name: str, tensors: list[Tensor], weights: Tensor, like: Tensor) -> None:
    number, rows = weights.shape
    chunk = ROWS if torch.get_num_threads() > 1 else max(rows, 1)
    run_rows(getattr(library(SOURCE), name), [*tensors, number, rows, like.shape[2]], rows, chunk)


class Gates(NamedTuple):
    """Neighboring gates that see as many experts each.

    Attributes:
        start: First of their rows of logits.
        gates: Number of gates.
        experts: Experts that each sees.
        lone: Whether they are self gates of a single expert, whose weight is a sigmoid.
    """

    start: int
    gates: int
    experts: int
    lone: bool


class Pair(NamedTuple):
    """A gate and an expert that it sees, by itself or by its self gate.

    Attributes:
        gate: The gate.
        expert: The expert.
        rows: Rows of logits whose weights add up to that of the pair.
    """

    gate: int
    expert: int
    rows: tuple[int, ...]


class Plan(NamedTuple):
    """Who sees whom.

    Attributes:
        tables: Masks (G, S, E) of gates and, if G = 2, of self gates.
        kinds: The gates, then the self gates, as rows of logits.
        pairs: All pairs, by gate.
        table: Gate and expert of every pair (pairs, 2), int64.
        rows: For the first and the second rows of pairs: which pairs have one, and which it is.
    """

    tables: Tensor
    kinds: list[Gates]
    pairs: list[Pair]
    table: Tensor
    rows: list[tuple[Tensor, Tensor]]

    @property
    def dense(self) -> bool:
        """Whether so many pairs are visible that a matmul is faster."""
        return 2 * len(self.pairs) > self.num_gates * self.num_experts

    @property
    def num_gates(self) -> int:
        """Number of gates S."""
        return self.tables.shape[1]

    @property
    def num_experts(self) -> int:
        """Number of experts E."""
        return self.tables.shape[2]


def plan_of(tables: Tensor) -> Plan:
    """List the visible pairs of gate and expert in masks (G, S, E), with their rows of logits.

    Logits are those of visible pairs, in the order of the masks.
    """
    kinds: list[Gates] = []
    rows: dict[tuple[int, int], list[int]] = {}
    start = 0
    for kind, table in enumerate(tables.tolist()):
        for s, row in enumerate(table):
            seen = [e for e, visible in enumerate(row) if visible]
            lone = kind == 1 and len(seen) == 1
            for position, e in enumerate(seen):
                rows.setdefault((s, e), []).append(start + position)
            if not seen:
                continue
            if kinds and kinds[-1][2:] == (len(seen), lone):
                kinds[-1] = kinds[-1]._replace(gates=kinds[-1].gates + 1)
            else:
                kinds.append(Gates(start, 1, len(seen), lone))
            start += len(seen)
    pairs = [Pair(s, e, tuple(numbers)) for (s, e), numbers in sorted(rows.items())]
    table = torch.tensor([pair[:2] for pair in pairs], device="cpu")
    places = []
    for position in range(2):
        have = [p for p, pair in enumerate(pairs) if len(pair.rows) > position]
        mine = [pairs[p].rows[position] for p in have]
        places.append(
            (torch.tensor(have, dtype=torch.int64), torch.tensor(mine, dtype=torch.int64))
        )
    return Plan(tables, kinds, pairs, table, places)


def mix(experts: Tensor, logits: Tensor, plan: Plan) -> Tensor:
    """Return the mixtures (N, S, D) of experts (N, E, D), given logits of visible pairs (N, P)."""
    return _mix(experts.transpose(0, 1), logits, plan).transpose(0, 1)


def forward(
    experts: Tensor, logits: Tensor, plan: Plan, *, cpp: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the mixtures (S, N, D) of experts (E, N, D), and the weights of rows (P, N)."""
    weights = _normalized(logits.mT.contiguous(), plan)
    of_pairs = _of_pairs(weights, plan)
    if plan.dense:
        return torch.bmm(_table(of_pairs, plan), experts.transpose(0, 1)).transpose(0, 1), weights
    out = experts.new_empty(plan.num_gates, *experts.shape[1:])
    for s in set(range(plan.num_gates)) - {pair.gate for pair in plan.pairs}:
        out[s] = 0
    if cpp:
        native_mix(experts, of_pairs, plan.table, out)
        return out, weights
    values, factors, results = experts.unbind(), of_pairs.unsqueeze(-1).unbind(), out.unbind()
    before = -1
    for (gate, expert, _), factor in zip(plan.pairs, factors, strict=True):
        if gate == before:
            results[gate].addcmul_(values[expert], factor)
        else:
            torch.mul(values[expert], factor, out=results[gate])
        before = gate
    return out, weights


def backward(
    grad: Tensor, experts: Tensor, weights: Tensor, plan: Plan, *, cpp: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the experts (E, N, D) and of the logits (N, P)."""
    of_pairs = _of_pairs(weights, plan)
    if plan.dense:
        rows = grad.transpose(0, 1)
        of_table = torch.bmm(rows, experts.permute(1, 2, 0)).permute(1, 2, 0)
        of_weights = of_table.flatten(0, 1)[_places(plan)]
        of_experts = torch.bmm(_table(of_pairs, plan).mT, rows).transpose(0, 1)
    else:
        of_experts = torch.zeros_like(experts, memory_format=torch.contiguous_format)
        of_weights = _by_pairs(grad, experts, of_pairs, plan, of_experts, cpp=cpp)
    of_rows = torch.empty_like(weights)
    for pairs, places in plan.rows:
        of_rows.index_copy_(0, places, of_weights.index_select(0, pairs))
    for kind, part, slope in _kinds(plan, weights, of_rows):
        along = part * slope
        if kind.lone:
            slope.copy_(along - along * part)
        else:
            slope.copy_(along - part * along.sum(1, keepdim=True))
    return of_experts, of_rows.mT


def _by_pairs(
    grad: Tensor,
    experts: Tensor,
    of_pairs: Tensor,
    plan: Plan,
    of_experts: Tensor,
    *,
    cpp: bool,
) -> Tensor:
    """Return the gradient of the weights of pairs, and add that of the experts."""
    if cpp:
        return native_differentiate(grad, experts, of_pairs, plan.table, of_experts)
    of_weights, product = torch.empty_like(of_pairs), torch.empty_like(grad[0])
    parts = zip(plan.pairs, of_pairs.unsqueeze(-1), of_weights, strict=True)
    for (gate, expert, _), factor, of_weight in parts:
        torch.sum(torch.mul(grad[gate], experts[expert], out=product), -1, out=of_weight)
        of_experts[expert].addcmul_(grad[gate], factor)
    return of_weights


def _normalized(logits: Tensor, plan: Plan) -> Tensor:
    """Return the weights (P, N) of logits (P, N)."""
    weights = torch.empty_like(logits)
    for kind, values, result in _kinds(plan, logits, weights):
        if kind.lone:
            torch.sigmoid(values, out=result)
        else:
            torch.softmax(values, 1, out=result)
    return weights


def _kinds(plan: Plan, *tables: Tensor) -> Iterator[tuple[Any, ...]]:
    """Iterate over the kinds of gates and their rows (gates, experts, N) of each table."""
    for kind in plan.kinds:
        rows = slice(kind.start, kind.start + kind.gates * kind.experts)
        sizes = kind.gates, kind.experts
        yield kind, *(t[rows].view(*sizes, t.shape[1]) for t in tables)


def _of_pairs(weights: Tensor, plan: Plan) -> Tensor:
    """Return the weight of every pair (pairs, N)."""
    (_, first), (pairs, second) = plan.rows
    mixed = weights.index_select(0, first)
    return mixed.index_add_(0, pairs, weights.index_select(0, second)) if len(pairs) else mixed


def _table(of_pairs: Tensor, plan: Plan) -> Tensor:
    """Return the weights as a table for every token (N, S, E), zero where a pair is hidden."""
    sizes = plan.num_gates, plan.num_experts
    if len(plan.pairs) == sizes[0] * sizes[1]:
        return of_pairs.mT.contiguous().view(-1, *sizes)
    table = of_pairs.new_zeros(of_pairs.shape[1], sizes[0] * sizes[1])
    return table.index_copy_(1, _places(plan), of_pairs.mT).view(-1, *sizes)


def _places(plan: Plan) -> Tensor:
    """Return the places of all pairs in a flat table (S E)."""
    return plan.table[:, 0] * plan.num_experts + plan.table[:, 1]


def _definition(experts: Tensor, logits: Tensor, plan: Plan) -> Tensor:
    places = plan.tables.flatten().nonzero().flatten()
    table = logits.new_zeros(len(logits), plan.tables.numel()).index_copy(1, places, logits)
    table = table.view(-1, *plan.tables.shape)
    return reference.forward(experts.transpose(0, 1), table, plan.tables).transpose(0, 1)


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, experts: Tensor, logits: Tensor, plan: Plan) -> Tensor:
        ctx.cpp = use_cpp(experts, logits)
        out, weights = forward(experts, logits, plan, cpp=ctx.cpp)
        ctx.save_for_backward(experts, logits, weights)
        ctx.plan = plan
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        experts, logits, weights = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *derivatives(_definition, (experts, logits), (ctx.plan,), grad), None
        return *backward(grad, experts, weights, ctx.plan, cpp=ctx.cpp), None


_mix: Callable[..., Tensor] = _Mix.apply
