"""The GShard top-2 gate."""

from typing import Literal, get_args

import torch
from torch import Tensor

from core_gates.errors import check_option
from core_gates.numerics import check_padding_mask, lowest_index_top_k
from core_gates.routing.capacity import CapacityRule, LimitedGate
from core_gates.routing.output import RoutingOutput

SecondPolicy = Literal["random", "sampling", "all"]


class GShardGate(LimitedGate):
    """Send each token to two experts while there is room (Lepikhin et al., 2021).

    The first expert is the most probable one. How the second comes about in training is the
    policy: the next probable expert, kept with probability min(1, 2 g₂) where g₂ is its weight
    (``random``, as published) or always (``all``), or the best of the others after Gumbel noise on
    the logits (``sampling``). In evaluation it is always the next probable one. Second choices
    queue after all first ones. The weights are the probabilities of what is kept, scaled to sum 1.

    The loss ``balance`` is E Σ_e f_e P_e over first choices: f_e the fraction of tokens whose first
    choice is e, without gradient, P_e the mean probability; 1 if balanced.

    Args:
        dim: Features of a token.
        num_experts: Number of experts, at least 2.
        second_policy: How the second expert comes about in training.
        capacity_factor: Room of an expert over that of one choice per token in balance; None
            drops nothing.
        eval_capacity_factor: The same in evaluation.
        capacity_rule: How the capacity is rounded; ``per_expert`` is the published 2 ⌈T / E⌉.
        eval_capacity_rule: The same in evaluation; that of training if None.
        prioritized: Whether tokens queue in descending order of their largest probability
            (Riquelme et al., 2021) instead of in token order.
        normalize_before_drop: Whether the two weights are scaled to sum 1 before anything is
            dropped, so that what remains may sum to less.
        padding_in_capacity: Whether ignored tokens count as tokens in the capacity.
        padding_in_mean: Whether they count as tokens in the two means of the loss, to which they
            add their probabilities but no choice.
        group_dim: Dimension of ``x`` whose tokens share the room; all tokens if None.
        device: Device of the parameter.
        dtype: Floating dtype of the parameter.

    Shape:
        ``x`` (..., D); weights, indices and kept (..., 2); probs and logits (..., E).

    Raises:
        ValueError: There are fewer than 2 experts, a factor is not positive, or the policy or the
            rule is unknown.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        second_policy: SecondPolicy = "random",
        capacity_factor: float | None = 2.0,
        eval_capacity_factor: float | None = 2.0,
        capacity_rule: CapacityRule = "ceil",
        eval_capacity_rule: CapacityRule | None = None,
        prioritized: bool = False,
        normalize_before_drop: bool = False,
        padding_in_capacity: bool = False,
        padding_in_mean: bool = False,
        group_dim: int | None = None,
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
        if num_experts < 2:
            raise ValueError(f"two choices need num_experts of at least 2, got {num_experts}")
        check_option("second_policy", second_policy, get_args(SecondPolicy))
        self.second_policy = second_policy
        self.prioritized = prioritized
        self.normalize_before_drop = normalize_before_drop
        self.padding_in_mean = padding_in_mean
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
            noise: Uniform numbers from [0, 1): (...) for the policy ``random``, (..., E) for
                ``sampling``; drawn in training if None.
        """
        logits = self.logits(x, padding_mask)
        probs = logits.softmax(-1)
        if noise is None and self.training and self.second_policy != "all":
            noise = torch.rand_like(logits if self.second_policy == "sampling" else logits[..., 0])
        indices = self._two_experts(logits.detach(), noise)
        weights = probs.gather(-1, indices)
        if self.normalize_before_drop:
            weights = _scaled(weights)
        routing = RoutingOutput(weights, indices, logits=logits, probs=probs)
        if noise is not None and self.second_policy == "random":
            share = _scaled(weights.detach())[..., 1]
            second = 2 * share > noise
            routing = routing._replace(kept=torch.stack([torch.ones_like(second), second], -1))
        priority = probs.amax(-1) if self.prioritized else None
        routing = self.limited(routing, padding_mask, priority)
        if routing.kept is not None:
            weights = routing.weights.masked_fill(~routing.kept, 0)
        aux = {"balance": self._balance(probs, indices[..., 0], padding_mask)}
        if not self.normalize_before_drop:
            weights = _scaled(weights)
        return routing._replace(weights=weights, aux=aux)

    def extra_repr(self) -> str:
        """Show the sizes in ``print(gate)``."""
        return f"{super().extra_repr()}, second_policy={self.second_policy!r}"

    def _two_experts(self, logits: Tensor, noise: Tensor | None) -> Tensor:
        if noise is None or self.second_policy != "sampling":
            return lowest_index_top_k(logits, 2)[1]
        first = lowest_index_top_k(logits, 1)[1]
        tiny = torch.finfo(noise.dtype).tiny
        gumbel = -(-noise.clamp(min=tiny).log()).clamp(min=tiny).log()
        others = (logits + gumbel).scatter(-1, first, -torch.inf)
        return torch.cat([first, lowest_index_top_k(others, 1)[1]], -1)

    def _balance(self, probs: Tensor, first: Tensor, padding_mask: Tensor | None) -> Tensor:
        chosen = torch.zeros_like(probs).scatter(-1, first.unsqueeze(-1), 1)
        number: int | Tensor = max(1, first.numel())
        if padding_mask is not None:
            check_padding_mask(padding_mask, first.shape)
            ignored = padding_mask.unsqueeze(-1)
            chosen = chosen.masked_fill(ignored, 0)
            if not self.padding_in_mean:
                probs = probs.masked_fill(ignored, 0)
                number = (~padding_mask).sum().clamp(min=1)
        share = chosen.reshape(-1, self.num_experts).sum(0) / number
        mean = probs.reshape(-1, self.num_experts).sum(0) / number
        return self.num_experts * (share * mean).sum()


def _scaled(weights: Tensor) -> Tensor:
    """Return the weights scaled to sum 1, or zeros where they are all zero."""
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
