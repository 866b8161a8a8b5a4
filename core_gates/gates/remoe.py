"""ReMoE: routing by a rectifier, with a sparsity that is steered."""

import math

import torch
from torch import Tensor

from core_gates.numerics import accumulation_dtype
from core_gates.routing.base import LinearRouter
from core_gates.routing.output import RoutingOutput

_BOUNDS = (1e-16, 1e16)  # where λ can still turn back within a few hundred steps


class ReMoEGate(LinearRouter):
    """Weigh experts by ``relu(x W)``; a zero is not routed (Wang et al., 2024).

    How many experts are active is held at ``k`` on average by the loss ``l1``, which is *complete*:
    add it with weight 1. It is λ mean_t Σ_e f_e w_te with f_e = 1, or f_e = E / (k T) times the
    number of tokens active at e (without gradient), so that busy experts are pressed more. Each
    `update` multiplies λ by ``rate`` if more than a fraction k / E of the weights of all
    micro-batches and ranks is active, and divides it if less is. λ grows faster than gates close:
    if it overshoots until no logit of any token is positive, no gradient opens them again, however
    small λ becomes. A lower ``rate``, from a higher first λ, prevents that in a short training.

    Args:
        dim: Features of a token.
        num_experts: Number of experts.
        k: Experts active per token on average.
        load_balanced: Whether the loss presses busy experts more.
        initial_penalty: First λ.
        rate: Factor of λ in one step; where few steps change much, 1.05 swings less.
        padding_in_loss: Whether ignored tokens still count in the loss.
        bias: Whether the logits have a bias.
        device: Device of the parameters and buffers.
        dtype: Floating dtype of the parameters; λ is kept in float32 at least.

    Shape:
        ``x`` (..., D); weights, probs and logits (..., E). ``probs`` are the weights scaled to
        sum 1, uniform where nothing is active and zero at ignored tokens.

    Raises:
        ValueError: ``k`` is not between 0 and ``num_experts``, ``initial_penalty`` is not positive,
            or ``rate`` not above 1.
    """

    penalty: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        k: float = 2,
        load_balanced: bool = True,
        initial_penalty: float = 1e-8,
        rate: float = 1.2,
        padding_in_loss: bool = False,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim,
            num_experts,
            bias=bias,
            summary_size=2,
            device=device,
            dtype=dtype,
        )
        if not 0 < k <= num_experts:
            raise ValueError(f"k must lie between 0 and num_experts={num_experts}, got {k}")
        if not initial_penalty > 0 or not rate > 1:
            raise ValueError(
                "initial_penalty must be positive and rate above 1, got"
                f" {initial_penalty} and {rate}"
            )
        self.k = k
        self.load_balanced = load_balanced
        self.rate = rate
        self.padding_in_loss = padding_in_loss
        self._initial_penalty = initial_penalty
        exact = accumulation_dtype(self.weight)
        self.register_buffer("penalty", torch.empty((), device=device, dtype=exact))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from N(0, 0.02²), zero the bias, return to the first λ."""
        super().reset_parameters()
        self.penalty.fill_(self._initial_penalty)

    def forward(
        self,
        x: Tensor,
        *,
        ids: Tensor | None = None,  # noqa: ARG002
        padding_mask: Tensor | None = None,
    ) -> RoutingOutput:
        """Route every token of ``x``; see `Gate`."""
        logits = self.logits(x, padding_mask)
        weights = logits.relu()
        total = weights.sum(-1, keepdim=True)
        tiny = torch.finfo(weights.dtype).tiny
        probs = torch.where(total == 0, 1 / self.num_experts, weights / total.clamp(min=tiny))
        if padding_mask is not None:
            probs = probs.masked_fill(padding_mask.unsqueeze(-1), 0)
        aux = {"l1": self.penalty * self._l1(weights, padding_mask)}
        routing = RoutingOutput(weights, logits=logits, probs=probs, aux=aux)
        return routing.ignore(padding_mask)

    def summary(self, routing: RoutingOutput) -> Tensor:
        """Return the number of tokens and that of their active experts."""
        if routing.probs is None:
            raise ValueError("ReMoEGate.summary needs a routing that the gate returned")
        real = routing.probs.sum(-1) > 0  # neither ignored nor NaN
        active = real.unsqueeze(-1) & (routing.weights > 0)
        return torch.stack([real.sum(), active.sum()])

    def update(self, summary: Tensor | None = None, step: int | None = None) -> None:  # noqa: ARG002
        """Move λ by one step, against the fraction of active weights on all ranks."""
        positions, active = self.given(summary).to(self.penalty.dtype)
        direction = (active - self.k * positions).sign()
        self.penalty.copy_((self.penalty * self.rate**direction).clamp(*_BOUNDS))

    def extra_repr(self) -> str:
        """Show the sizes in ``print(gate)``."""
        return f"{super().extra_repr()}, k={self.k}, load_balanced={self.load_balanced}"

    def _l1(self, weights: Tensor, padding_mask: Tensor | None) -> Tensor:
        number: int | Tensor = max(1, math.prod(weights.shape[:-1]))
        if padding_mask is not None and not self.padding_in_loss:
            weights = weights.masked_fill(padding_mask.unsqueeze(-1), 0)
            number = (~padding_mask).sum().clamp(min=1)
        weights = weights.reshape(-1, self.num_experts)
        if self.load_balanced:
            share = (weights.detach() > 0).to(weights.dtype).sum(0) / number
            weights = weights * (share * self.num_experts / self.k)
        return weights.sum() / number
