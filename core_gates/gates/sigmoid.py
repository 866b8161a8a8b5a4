"""The sigmoid gate, balanced without a loss and limited to groups of experts."""

import torch
from torch import Tensor
from torch.nn import functional as F

from core_gates.errors import check_at_least
from core_gates.numerics import accumulation_dtype, lowest_index_top_k
from core_gates.routing.base import LinearRouter
from core_gates.routing.capacity import count_routed
from core_gates.routing.output import RoutingOutput


class SigmoidGate(LinearRouter):
    """Weigh experts by ``s = sigmoid(x W)``, all of them or the ``k`` best (DeepSeek-AI, 2024).

    Where scores are equal because the sigmoid saturates, the larger logit is better.

    The weights are the scores of the routed experts, scaled to sum ``scale``. With a
    ``balance_rate`` u the best are chosen by s + b instead; the bias b, no parameter, never enters
    the weights, and each `update` moves it by ``u sign(mean count - count)`` over the
    tokens of all micro-batches and ranks (Wang et al., 2024). With ``num_groups`` the experts
    form groups of neighbors; a token uses only the ``num_kept_groups`` groups whose two best
    s + b have the largest sum.

    Args:
        dim: Features of a token.
        num_experts: Number of experts.
        k: Experts kept per token; None keeps all, in dense form.
        renormalize: Whether the weights of a token sum to ``scale``.
        scale: Factor of the weights (2.5 in DeepSeek-V3).
        balance_rate: u, 0 for no balancing (0.001 in DeepSeek-V3).
        centered: Whether a step of b has mean zero over the experts.
        num_groups: Number of groups, a divisor of ``num_experts`` (8 in DeepSeek-V3).
        num_kept_groups: Groups a token may use (4 in DeepSeek-V3); all if None.
        bias: Whether the logits have a bias, a parameter.
        device: Device of the parameters and buffers.
        dtype: Floating dtype of the parameters; b is kept in float32 at least.

    Shape:
        ``x`` (..., D); probs and logits (..., E); weights and indices (..., K), or weights (..., E)
        if ``k`` is None. ``probs`` are the scores scaled to sum 1.

    Raises:
        ValueError: ``k``, ``balance_rate`` or the groups are out of range, or balancing or groups
            are asked of a gate that keeps all experts.
    """

    balance_bias: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        k: int | None = None,
        renormalize: bool = True,
        scale: float = 1.0,
        balance_rate: float = 0.0,
        centered: bool = False,
        num_groups: int = 1,
        num_kept_groups: int | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim,
            num_experts,
            bias=bias,
            summary_size=num_experts + 1,
            device=device,
            dtype=dtype,
        )
        self.k = k
        self.renormalize = renormalize
        self.scale = scale
        self.balance_rate = balance_rate
        self.centered = centered
        self.num_groups = num_groups
        self.num_kept_groups = num_groups if num_kept_groups is None else num_kept_groups
        self._check()
        exact = accumulation_dtype(self.weight)
        self.register_buffer("balance_bias", torch.empty(num_experts, device=device, dtype=exact))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from N(0, 0.02²) and zero both biases."""
        super().reset_parameters()
        self.balance_bias.zero_()

    def forward(
        self,
        x: Tensor,
        *,
        ids: Tensor | None = None,  # noqa: ARG002
        padding_mask: Tensor | None = None,
    ) -> RoutingOutput:
        """Route every token of ``x``; see `Gate`."""
        logits = self.logits(x, padding_mask)
        # The softmax of log s is s / Σ s, also where every s underflows.
        log_scores = F.logsigmoid(logits)
        probs = log_scores.softmax(-1)
        indices = None if self.k is None else self._best(logits.detach(), self.k)
        routed = log_scores if indices is None else log_scores.gather(-1, indices)
        weights = routed.softmax(-1) if self.renormalize else routed.exp()
        routing = RoutingOutput(self.scale * weights, indices, logits=logits, probs=probs)
        return routing.ignore(padding_mask)

    @property
    def learns_from_routings(self) -> bool:
        """True if the gate balances."""
        return self.balance_rate > 0

    def summary(self, routing: RoutingOutput) -> Tensor:
        """Return the choices of every expert and the number of tokens that are not finite."""
        return count_routed(routing, self.num_experts)

    def update(self, summary: Tensor | None = None, step: int | None = None) -> None:  # noqa: ARG002
        """Move the balancing bias by one step, against the load of all ranks."""
        if not self.learns_from_routings:
            return
        load = self.given(summary)[:-1]
        direction = (load.sum() - self.num_experts * load).sign().to(self.balance_bias.dtype)
        if self.centered:
            direction -= direction.mean()
        self.balance_bias += self.balance_rate * direction

    def extra_repr(self) -> str:
        """Show the sizes in ``print(gate)``."""
        return f"{super().extra_repr()}, k={self.k}, balance_rate={self.balance_rate}"

    def _best(self, logits: Tensor, k: int) -> Tensor:
        biased = logits.sigmoid() + self.balance_bias
        if self.num_kept_groups < self.num_groups:
            groups = biased.view(
                *biased.shape[:-1], self.num_groups, self.num_experts // self.num_groups
            )
            by_group = logits.view_as(groups)
            best_two, which = lowest_index_top_k(groups, min(2, groups.shape[-1]), ties=by_group)
            _, kept = lowest_index_top_k(
                best_two.sum(-1), self.num_kept_groups, ties=by_group.gather(-1, which).sum(-1)
            )
            closed = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(-1, kept, False)
            biased = groups.masked_fill(closed.unsqueeze(-1), -torch.inf).flatten(-2)
        return lowest_index_top_k(biased, k, ties=logits)[1]

    def _check(self) -> None:
        check_at_least(0, balance_rate=self.balance_rate)
        if self.num_groups < 1 or self.num_experts % self.num_groups:
            raise ValueError(
                f"num_groups must divide num_experts={self.num_experts}, got {self.num_groups}"
            )
        if not 1 <= self.num_kept_groups <= self.num_groups:
            raise ValueError(
                f"num_kept_groups must lie between 1 and num_groups={self.num_groups}, got"
                f" {self.num_kept_groups}"
            )
        if self.k is None:
            if self.balance_rate or self.num_kept_groups < self.num_groups:
                raise ValueError("balancing and groups choose among experts: give k")
            return
        available = self.num_kept_groups * self.num_experts // self.num_groups
        if not 1 <= self.k <= available:
            raise ValueError(
                f"k must lie between 1 and the {available} experts a token may use, got {self.k}"
            )
