"""Gates that route to as many experts as the probabilities call for."""

from abc import abstractmethod

import torch
from torch import Tensor

from core_gates.errors import check_fraction
from core_gates.numerics import stable_sort
from core_gates.routing.base import LinearRouter
from core_gates.routing.output import RoutingOutput


class _SubsetGate(LinearRouter):
    """A softmax of which a part, different for each token, is routed."""

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        renormalize: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(dim, num_experts, device=device, dtype=dtype)
        self.renormalize = renormalize
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
        weights = probs.masked_fill(~self._routed(probs.detach()), 0)
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return RoutingOutput(weights, logits=logits, probs=probs).ignore(padding_mask)

    @abstractmethod
    def _routed(self, probs: Tensor) -> Tensor:
        """Return True (..., E) at the routed experts, at least one; it must not hide a NaN."""


class TopPGate(_SubsetGate):
    """Send each token to the fewest experts that together reach ``p`` (Huang et al., 2024).

    Tokens without a clear favorite use many experts, confident ones few. Equal probabilities go to
    the lowest index.

    Args:
        dim: Features of a token.
        num_experts: Number of experts.
        p: Probability that the experts must reach together; 1 routes to all.
        renormalize: Whether the weights of a token sum to 1.
        device: Device of the parameter.
        dtype: Floating dtype of the parameter.

    Shape:
        ``x`` (..., D); weights, zero where nothing is routed, probs and logits (..., E).

    Raises:
        ValueError: ``p`` is not in (0, 1].
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        p: float = 0.7,
        renormalize: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not 0 < p <= 1:
            raise ValueError(f"p must lie in (0, 1], got {p}")
        super().__init__(dim, num_experts, renormalize=renormalize, device=device, dtype=dtype)
        self.p = p

    def _routed(self, probs: Tensor) -> Tensor:
        if self.p == 1:  # rounded sums reach 1 before the last expert
            return torch.ones_like(probs, dtype=torch.bool)
        falling, order = stable_sort(probs, descending=True)
        before = falling.cumsum(-1).roll(1, -1)
        before[..., 0] = 0
        return torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, before < self.p)


class ThresholdGate(_SubsetGate):
    """Send each token to every expert more probable than ``threshold``, at least to the best.

    Args:
        dim: Features of a token.
        num_experts: Number of experts.
        threshold: Probability that an expert must exceed.
        renormalize: Whether the weights of a token sum to 1.
        device: Device of the parameter.
        dtype: Floating dtype of the parameter.

    Shape:
        ``x`` (..., D); weights, zero where nothing is routed, probs and logits (..., E).

    Raises:
        ValueError: ``threshold`` is not in [0, 1).
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        threshold: float = 0.1,
        renormalize: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_fraction(threshold=threshold)
        super().__init__(dim, num_experts, renormalize=renormalize, device=device, dtype=dtype)
        self.threshold = threshold

    def _routed(self, probs: Tensor) -> Tensor:
        best = probs.argmax(-1, keepdim=True)
        return (probs > self.threshold).scatter(-1, best, True)
