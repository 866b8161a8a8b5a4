"""The gate of the BASE layer."""

import torch
from torch import Tensor
from torch.nn import functional as F

from core_gates.numerics import lowest_index_top_k
from core_gates.routing.assignment import balanced_assignment
from core_gates.routing.base import LinearRouter
from core_gates.routing.capacity import group_positions, ungroup_positions
from core_gates.routing.output import RoutingOutput


class BaseLayerGate(LinearRouter):
    """Assign tokens to experts such that all have the same load (Lewis et al., 2021).

    In training each token goes to one expert, no expert takes more than ⌈T / E⌉ of T tokens,
    and the sum of the logits x W is maximal: no loss and no capacity is needed. Up to
    ``exact_up_to`` tokens the assignment is exact, beyond it is that of an auction whose sum is
    within 0.02 % of it. Both are computed on the host. In evaluation each token takes its best
    expert. The weight is the sigmoid of the logit.

    The assignment compares tokens with each other: a causal model must not use this gate.

    Args:
        dim: Features of a token.
        num_experts: Number of experts.
        exact_up_to: Largest number of tokens of a group that is assigned exactly.
        group_dim: Dimension of ``x`` along which tokens compete; all tokens if None.
        bias: Whether the logits have a bias.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Shape:
        ``x`` (..., D); weights and indices (..., 1); probs and logits (..., E). ``probs`` are the
        sigmoids scaled to sum 1.
    """

    couples_tokens = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        exact_up_to: int = 1024,
        group_dim: int | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_experts, bias=bias, device=device, dtype=dtype)
        self.exact_up_to = exact_up_to
        self.group_dim = group_dim
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
        if self.training:
            indices = self._assign(logits.detach(), padding_mask)
        else:
            _, indices = lowest_index_top_k(logits, 1)
        weights = logits.gather(-1, indices).sigmoid()
        probs = F.logsigmoid(logits).softmax(-1)
        return RoutingOutput(weights, indices, logits=logits, probs=probs).ignore(padding_mask)

    def _assign(self, logits: Tensor, padding_mask: Tensor | None) -> Tensor:
        counted = None
        if padding_mask is not None:
            counted = ~group_positions(padding_mask.unsqueeze(-1), self.group_dim).squeeze(-1)
        experts = balanced_assignment(
            group_positions(logits, self.group_dim), counted, exact_up_to=self.exact_up_to
        )
        return ungroup_positions(experts.unsqueeze(-1), logits.shape[:-1], self.group_dim)
