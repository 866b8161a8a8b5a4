"""The gate by which experts choose their tokens."""

import torch
from torch import Tensor

from core_gates.numerics import stable_sort
from core_gates.routing.capacity import (
    CapacityRule,
    LimitedGate,
    group_capacity,
    group_positions,
    ungroup_positions,
)
from core_gates.routing.output import RoutingOutput


class ExpertChoiceGate(LimitedGate):
    """Let every expert take the tokens that score highest for it (Zhou et al., 2022).

    The scores are S = softmax(x W) over the experts; each expert takes the C = ⌈cf T / E⌉ best of T
    tokens, and the weight of what it took is S. The load is equal by construction, and a
    token is used by any number of experts, also by none. Equal scores go to the first token.

    The gate compares tokens with each other: a causal model must not use it.

    Args:
        dim: Features of a token.
        num_experts: Number of experts.
        capacity_factor: Mean number of experts of a token in training, cf.
        eval_capacity_factor: The same in evaluation; that of training if None.
        capacity_rule: How C is rounded, see `core_gates.routing.capacity.capacity`.
        eval_capacity_rule: The same in evaluation; that of training if None.
        padding_in_capacity: Whether ignored tokens count as tokens in the capacity.
        group_dim: Dimension of ``x`` along which tokens compete; all tokens if None.
        bias: Whether the logits have a bias.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Shape:
        ``x`` (..., D); weights, probs and logits (..., E).

    Raises:
        ValueError: The capacity factor is not positive, or the rule is unknown.
    """

    couples_tokens = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        capacity_factor: float = 2.0,
        eval_capacity_factor: float | None = None,
        capacity_rule: CapacityRule = "ceil",
        eval_capacity_rule: CapacityRule | None = None,
        padding_in_capacity: bool = False,
        group_dim: int | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        evaluated = capacity_factor if eval_capacity_factor is None else eval_capacity_factor
        super().__init__(
            dim,
            num_experts,
            capacity_factor=capacity_factor,
            eval_capacity_factor=evaluated,
            capacity_rule=capacity_rule,
            eval_capacity_rule=eval_capacity_rule,
            padding_in_capacity=padding_in_capacity,
            group_dim=group_dim,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.reset_parameters()

    def forward(
        self,
        x: Tensor,
        *,
        ids: Tensor | None = None,  # noqa: ARG002
        padding_mask: Tensor | None = None,
    ) -> RoutingOutput:
        """Route every token of ``x``; see `Gate`."""
        logits = self.logits(x, padding_mask)
        probs = logits.softmax(-1)
        chosen = self._choose(probs.detach(), padding_mask)
        return RoutingOutput(probs.masked_fill(~chosen, 0), logits=logits, probs=probs)

    def _choose(self, probs: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Return (..., E), True where the expert takes the token."""
        scores = group_positions(probs, self.group_dim)
        num_tokens, real = scores.shape[1], None
        if padding_mask is not None:
            padding = group_positions(padding_mask.unsqueeze(-1), self.group_dim)
            scores = scores.masked_fill(padding, -1)  # below every probability
            real = None if self.padding_in_capacity else ~padding
        factor, rule = self.room
        assert factor is not None
        limit = group_capacity(
            num_tokens,
            self.num_experts,
            factor,
            rule,
            real,
            scores.device,
        )
        order = stable_sort(scores, dim=1, descending=True)[1]
        places = torch.arange(num_tokens, device=order.device).view(1, -1, 1).expand_as(order)
        chosen = torch.zeros_like(order).scatter(1, order, places) < limit
        chosen = ungroup_positions(chosen, probs.shape[:-1], self.group_dim)
        return chosen if padding_mask is None else chosen & ~padding_mask.unsqueeze(-1)
