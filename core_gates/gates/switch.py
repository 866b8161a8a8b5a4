"""The Switch gate."""

import torch
from torch import Tensor

from core_gates.errors import check_fraction
from core_gates.numerics import accumulation_dtype, lowest_index_top_k
from core_gates.routing.capacity import CapacityRule, LimitedGate
from core_gates.routing.output import RoutingOutput


class SwitchGate(LimitedGate):
    """Send each token to its most probable expert while there is room (Fedus et al., 2021).

    The weight is the probability itself. Tokens queue at their expert in order; those beyond its
    capacity are dropped (``kept`` False): only the residual connection carries them. In training
    the input is multiplied by uniform numbers from [1 - jitter, 1 + jitter].
    Balance it by ``0.01 * balance_loss(routing)``.

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
        group_dim: Dimension of ``x`` whose tokens share the room; all tokens if None.
        jitter: Half width of the noise on the input; 0 for none.
        device: Device of the parameter.
        dtype: Floating dtype of the parameter.

    Shape:
        ``x`` (..., D); weights, indices and kept (..., 1); probs and logits (..., E).

    Raises:
        ValueError: A factor is not positive, the rule is unknown or ``jitter`` not in [0, 1).
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        capacity_factor: float | None = 1.25,
        eval_capacity_factor: float | None = 2.0,
        capacity_rule: CapacityRule = "ceil",
        eval_capacity_rule: CapacityRule | None = None,
        padding_in_capacity: bool = False,
        group_dim: int | None = None,
        jitter: float = 0.01,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim,
            num_experts,
            capacity_factor=capacity_factor,
            eval_capacity_factor=eval_capacity_factor,
            capacity_rule=capacity_rule,
            eval_capacity_rule=eval_capacity_rule,
            padding_in_capacity=padding_in_capacity,
            group_dim=group_dim,
            device=device,
            dtype=dtype,
        )
        check_fraction(jitter=jitter)
        self.jitter = jitter
        self.reset_parameters()

    def forward(
        self,
        x: Tensor,
        *,
        ids: Tensor | None = None,  # noqa: ARG002
        padding_mask: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> RoutingOutput:
        """Route every token of ``x``; see `Gate`.

        Args:
            x: Routing input (..., D).
            ids: Not used.
            padding_mask: True (...) at tokens to ignore.
            noise: Numbers from [-1, 1] (..., D) that ``jitter`` scales; drawn in training if None.
        """
        if self.jitter and (self.training or noise is not None):
            x = x.to(accumulation_dtype(x))
            if noise is None:  # in one order, whatever the strides of x
                noise = 2 * torch.rand_like(x, memory_format=torch.contiguous_format) - 1
            x = x * (1 + self.jitter * noise)
        logits = self.logits(x, padding_mask)
        probs = logits.softmax(-1)
        _, indices = lowest_index_top_k(logits, 1)
        routing = RoutingOutput(probs.gather(-1, indices), indices, logits=logits, probs=probs)
        return self.limited(routing, padding_mask)
