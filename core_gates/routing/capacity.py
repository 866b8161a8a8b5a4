"""Groups of tokens, counts of experts, and how many tokens an expert takes."""

import math
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from core_gates.errors import GatesError, check_option, check_positive
from core_gates.numerics import check_padding_mask, stable_sort, widest_float
from core_gates.routing.base import LinearRouter
from core_gates.routing.output import RoutingOutput


def group_positions(values: Tensor, group_dim: int | None) -> Tensor:
    """Return (G, T, K): G groups of T tokens each.

    Args:
        values: Values of the tokens (..., K).
        group_dim: Dimension of ``values`` along which tokens compete; None for one group of all
            tokens.

    Raises:
        ValueError: ``group_dim`` is not a dimension of tokens.
    """
    if group_dim is None:
        return values.reshape(1, math.prod(values.shape[:-1]), values.shape[-1])
    _check_dim(group_dim, values.ndim)
    moved = values.movedim(group_dim, -2)
    return moved.reshape(math.prod(moved.shape[:-2]), *moved.shape[-2:])


def ungroup_positions(values: Tensor, leading: torch.Size, group_dim: int | None) -> Tensor:
    """Undo `group_positions`.

    Args:
        values: Grouped values (G, T, K).
        leading: Shape of the tokens, that of the ungrouped values without K.
        group_dim: As in `group_positions`.

    Returns:
        Values (..., K).
    """
    if group_dim is None:
        return values.reshape(*leading, values.shape[-1])
    others = list(leading)
    length = others.pop(group_dim % (len(leading) + 1))
    return values.reshape(*others, length, values.shape[-1]).movedim(-2, group_dim)


def _check_dim(group_dim: int, num_dims: int) -> None:
    if not -num_dims <= group_dim < num_dims or group_dim % num_dims == num_dims - 1:
        raise ValueError(
            f"group_dim must be a dimension of the {num_dims - 1} before the features, got"
            f" {group_dim}"
        )


def count_routed(routing: RoutingOutput, num_experts: int | None = None) -> Tensor:
    """Count the kept choices of every expert and the tokens that are not finite.

    A token with a weight that is NaN or infinite counts in the last element alone. Sums over
    micro-batches and ranks are those of the joined batch.

    Args:
        routing: Output of a gate.
        num_experts: Needed where the output does not know it.

    Returns:
        Counts (E + 1,), int64, on the device of the weights; not read on the host.
    """
    finite = routing.weights.detach().isfinite().all(-1)
    if routing.dispatch is not None:
        finite = finite.all(-1)
    chosen = routing.chosen(num_experts, dropped=False).detach()
    chosen = chosen.masked_fill(~finite.unsqueeze(-1), 0).reshape(-1, chosen.shape[-1])
    counts = chosen.sum(0, dtype=torch.int64)
    return torch.cat([counts, (~finite).sum().reshape(1)])


def count_non_finite(weights: Tensor) -> Tensor:
    """Return the number of weights that are not finite (), int64; not read on the host."""
    return (~weights.detach().isfinite()).sum()


def refuse_non_finite(number: int, gate: str = "the gate") -> None:
    """Refuse a routing by the number of its weights that are not finite, outside of compilation.

    Raises:
        GatesError: The number is not zero.
    """
    if not torch.compiler.is_compiling() and number:
        raise GatesError(
            f"{gate} returned {number} weight{'s' * (number > 1)} that are not finite;"
            " look for NaN or infinity in its input and its parameters"
        )


def read_counts(counts: Tensor, gate: str = "gate") -> list[int]:
    """Bring counts of `count_routed` to the host.

    Args:
        counts: Counts (E + 1,).
        gate: Name of the gate, for errors.

    Returns:
        Kept choices of every expert.

    Raises:
        GatesError: The routing of a token was not finite.
    """
    *routed, non_finite = counts.tolist()
    if non_finite:
        raise GatesError(
            f"gate {gate!r} routed {non_finite} token{'s' * (non_finite > 1)} with weights that"
            " are not finite; look for NaN or infinity in its input and its parameters"
        )
    return routed


CapacityRule = Literal["ceil", "floor", "per_expert", "per_token"]
_SLACK = 1e-12  # 1.1 · 100 / 10 is 11.000000000000002 ...
_SLACK_FLOAT32 = 1e-6  # ... and 11.000001 where there is no float64


def capacity(
    num_tokens: int, num_experts: int, capacity_factor: float, rule: CapacityRule = "ceil"
) -> int:
    """Return how many choices an expert takes, at least 1.

    With T tokens, E experts and factor cf, the rules are

    - ``ceil``: ⌈cf T / E⌉,
    - ``floor``: ⌊cf T / E⌋ (Fedus et al., 2021),
    - ``per_expert``: ⌊cf ⌈T / E⌉⌋ (fairseq; GShard with cf = 2),
    - ``per_token``: ⌈cf T⌉ (evaluation in fairseq with cf = 0.25).

    Args:
        num_tokens: Number of tokens T.
        num_experts: Number of experts E.
        capacity_factor: Factor cf; 1 fits a balanced routing of one choice per token.
        rule: How the number is rounded.

    Raises:
        ValueError: The factor is not positive or the rule is unknown.
    """
    check_capacity(capacity_factor, rule)
    return max(1, int(_by_rule(num_tokens, num_experts, capacity_factor, rule, math)))


def group_capacity(
    num_tokens: int,
    num_experts: int,
    capacity_factor: float,
    rule: CapacityRule,
    real: Tensor | None,
    device: torch.device,
) -> int | Tensor:
    """Return `capacity` of every group of tokens, of which only some are real.

    Where the call is compiled or exported it is computed on the device, so that the number of
    tokens may be dynamic.

    Args:
        num_tokens: Tokens T of a group.
        num_experts: As in `capacity`.
        capacity_factor: As in `capacity`.
        rule: As in `capacity`.
        real: True (G, T, 1) at tokens that count; None if all do.
        device: Device of the result, if it is a tensor.

    Returns:
        One number for all groups, or one of each (G, 1, 1), in the widest dtype of the device.
    """
    if real is not None:
        number = real.sum(-2, keepdim=True).to(widest_float(real.device))
    elif torch.compiler.is_compiling():
        number = torch.full((1, 1, 1), num_tokens, dtype=widest_float(device), device=device)
    else:
        return capacity(num_tokens, num_experts, capacity_factor, rule)
    return cast(Tensor, _by_rule(number, num_experts, capacity_factor, rule, torch).clamp(min=1))


def check_capacity(capacity_factor: float | None, rule: CapacityRule) -> None:
    """Refuse a factor that is neither positive nor None (no limit), and an unknown rule.

    Raises:
        ValueError: One of the two does not hold.
    """
    check_positive(capacity_factor=capacity_factor)
    check_option("capacity_rule", rule, get_args(CapacityRule))


def positions_in_expert(
    indices: Tensor,
    num_experts: int,
    *,
    counted: Tensor | None = None,
    priority: Tensor | None = None,
) -> Tensor:
    """Return the place of every choice in the queue of its expert, from 0.

    First choices queue in token order, followed by the second choices of all tokens, and so on.

    Args:
        indices: Expert of every choice (..., T, K); each leading index is a group with its own
            queues.
        num_experts: Number of experts.
        counted: False (..., T, K) at choices that do not queue; their place has no meaning.
        priority: Score (..., T); tokens queue in descending order of it instead.

    Returns:
        Places (..., T, K), int64.
    """
    if priority is not None:
        order = stable_sort(priority.detach(), descending=True)[1]
        order = order.unsqueeze(-1).expand_as(indices)
        ranked = None if counted is None else counted.gather(-2, order)
        places = positions_in_expert(indices.gather(-2, order), num_experts, counted=ranked)
        return torch.zeros_like(places).scatter(-2, order, places)
    # One stable sort by (group, expert); what does not queue goes to an expert beyond the last.
    queue = indices if counted is None else torch.where(counted, indices, num_experts)
    queue = queue.mT
    num_groups = math.prod(queue.shape[:-2])
    group = torch.arange(num_groups, device=queue.device).view(*queue.shape[:-2], 1, 1)
    flat = (queue + group * (num_experts + 1)).flatten()
    order = stable_sort(flat)[1]
    sizes = flat.new_zeros(num_groups * (num_experts + 1))
    sizes = sizes.scatter_add(0, flat, torch.ones_like(flat))
    starts = sizes.cumsum(0) - sizes
    rank = torch.arange(flat.numel(), device=flat.device) - starts[flat[order]]
    return torch.zeros_like(flat).scatter(0, order, rank).view(queue.shape).mT


def limit_capacity(
    routing: RoutingOutput,
    capacity_factor: float | None,
    *,
    rule: CapacityRule = "ceil",
    padding_mask: Tensor | None = None,
    padding_in_capacity: bool = False,
    group_dim: int | None = None,
    priority: Tensor | None = None,
) -> RoutingOutput:
    """Drop, by ``kept`` False, what exceeds the capacity of an expert.

    Choices that are not kept already, such as those of padding, take no place in a queue.

    Args:
        routing: Routing with indices (..., K).
        capacity_factor: Factor of `capacity`; None drops nothing.
        rule: Rule of `capacity`.
        padding_mask: True (...) at tokens to ignore.
        padding_in_capacity: Whether ignored tokens count as tokens in the capacity.
        group_dim: Dimension of the routing input whose tokens share queues; all tokens of
            the call if None.
        priority: Score (...); tokens queue in descending order of it, not in their own.

    Raises:
        ValueError: The routing has no indices, or the mask or the dimension does not fit.
    """
    if capacity_factor is None:
        return routing
    if routing.indices is None:
        raise ValueError("only a routing with indices has a capacity; call to_top_k first")
    num_experts = routing.num_experts
    indices = group_positions(routing.indices, group_dim)
    real = None
    if padding_mask is not None:
        check_padding_mask(padding_mask, routing.indices.shape[:-1])
        if not padding_in_capacity:
            real = group_positions(~padding_mask.unsqueeze(-1), group_dim)
    limit = group_capacity(
        indices.shape[-2], num_experts, capacity_factor, rule, real, indices.device
    )
    places = positions_in_expert(
        indices,
        num_experts,
        counted=None if routing.kept is None else group_positions(routing.kept, group_dim),
        priority=None
        if priority is None
        else group_positions(priority.unsqueeze(-1), group_dim).squeeze(-1),
    )
    fits = ungroup_positions(places < limit, routing.indices.shape[:-1], group_dim)
    return routing._replace(kept=fits if routing.kept is None else routing.kept & fits)


def _by_rule(num_tokens: Any, num_experts: int, factor: float, rule: CapacityRule, by: Any) -> Any:
    """Evaluate a rule by the functions of ``math`` (numbers) or ``torch`` (floating tensors)."""
    short = isinstance(num_tokens, Tensor) and num_tokens.dtype == torch.float32
    slack = _SLACK_FLOAT32 if short else _SLACK
    if rule == "per_token":
        return by.ceil(factor * num_tokens * (1 - slack))
    if rule == "per_expert":
        return by.floor(factor * by.ceil(num_tokens / num_experts) * (1 + slack))
    if rule == "floor":
        return by.floor(factor * num_tokens / num_experts * (1 + slack))
    return by.ceil(factor * num_tokens / num_experts * (1 - slack))


class LimitedGate(LinearRouter):
    """Base of gates with a capacity, set for training and evaluation apart.

    Args:
        dim: Features of a token.
        num_experts: Number of experts.
        capacity_factor: Room of an expert in training over that of a balanced routing; None drops
            nothing.
        eval_capacity_factor: The same in evaluation.
        capacity_rule: How the capacity is rounded; see
            `core_gates.routing.capacity.capacity`.
        eval_capacity_rule: The same in evaluation; that of training if None.
        padding_in_capacity: Whether ignored tokens count as tokens in the capacity.
        group_dim: Dimension of ``x`` whose positions share the room; all positions if None.
        bias: Whether the logits have a bias.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Raises:
        ValueError: A factor is not positive or a rule is unknown.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        capacity_factor: float | None,
        eval_capacity_factor: float | None,
        capacity_rule: CapacityRule = "ceil",
        eval_capacity_rule: CapacityRule | None = None,
        padding_in_capacity: bool = False,
        group_dim: int | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_experts, bias=bias, device=device, dtype=dtype)
        self.capacity_factor, self.eval_capacity_factor = capacity_factor, eval_capacity_factor
        self.capacity_rule = capacity_rule
        self.eval_capacity_rule: CapacityRule = eval_capacity_rule or capacity_rule
        check_capacity(capacity_factor, self.capacity_rule)
        check_capacity(eval_capacity_factor, self.eval_capacity_rule)
        self.padding_in_capacity, self.group_dim = padding_in_capacity, group_dim
        self.couples_tokens = capacity_factor is not None or eval_capacity_factor is not None

    @property
    def room(self) -> tuple[float | None, CapacityRule]:
        """The factor and the rule of the present mode."""
        if self.training:
            return self.capacity_factor, self.capacity_rule
        return self.eval_capacity_factor, self.eval_capacity_rule

    def limited(
        self, routing: RoutingOutput, padding_mask: Tensor | None, priority: Tensor | None = None
    ) -> RoutingOutput:
        """Drop what exceeds the room; see `core_gates.routing.capacity.limit_capacity`."""
        factor, rule = self.room
        return limit_capacity(
            routing.ignore(padding_mask),
            factor,
            rule=rule,
            padding_mask=padding_mask,
            padding_in_capacity=self.padding_in_capacity,
            group_dim=self.group_dim,
            priority=priority,
        )

    def extra_repr(self) -> str:
        """Show the sizes in ``print(gate)``."""
        return f"{super().extra_repr()}, capacity_factor={self.capacity_factor}"
