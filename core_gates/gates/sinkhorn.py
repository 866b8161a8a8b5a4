"""The gate that balances experts by Sinkhorn iterations."""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from core_gates.errors import check_at_least, check_option
from core_gates.numerics import lowest_index_top_k
from core_gates.routing.base import LinearRouter
from core_gates.routing.capacity import group_positions, ungroup_positions
from core_gates.routing.output import RoutingOutput

Score = Literal["softmax", "sigmoid"]


class SinkhornGate(LinearRouter):
    """Choose by the transport plan between tokens and equally loaded experts (S-BASE).

    In training, exp(x W) is scaled alternately so that every token holds the same mass and every
    expert as well (Clark et al., 2022); each token takes the ``k`` experts with the largest
    entries of its row. These are the experts with the largest x W - price, where the scaling sets
    the prices. The load is then nearly equal. In evaluation there are no prices. The weights are
    the scores of the raw logits, not scaled to sum 1.

    The prices compare tokens with each other: a causal model must not use this gate.

    Args:
        dim: Features of a token.
        num_experts: Number of experts.
        k: Experts of a token.
        score: How a logit becomes a weight, by ``softmax`` over all experts or by ``sigmoid``.
        num_iterations: Scalings of tokens and experts.
        group_dim: Dimension of ``x`` along which tokens compete; all tokens if None.
        bias: Whether the logits have a bias.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Shape:
        ``x`` (..., D); weights and indices (..., K); probs and logits (..., E). Under ``sigmoid``,
        ``probs`` are the scores scaled to sum 1.

    Raises:
        ValueError: ``k`` or ``num_iterations`` is out of range, or ``score`` is unknown.
    """

    couples_tokens = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        k: int = 1,
        score: Score = "softmax",
        num_iterations: int = 20,
        group_dim: int | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_experts, bias=bias, device=device, dtype=dtype)
        check_option("score", score, get_args(Score))
        check_at_least(1, num_iterations=num_iterations)
        self.k = self.checked_k(k)
        self.score: Score = score
        self.num_iterations = num_iterations
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
        chosen_by = logits.detach()
        if self.training:
            chosen_by = self._less_prices(chosen_by, padding_mask)
        _, indices = lowest_index_top_k(chosen_by, self.k)
        log_scores = logits if self.score == "softmax" else F.logsigmoid(logits)
        probs = log_scores.softmax(-1)
        scores = probs if self.score == "softmax" else logits.sigmoid()
        weights = scores.gather(-1, indices)
        return RoutingOutput(weights, indices, logits=logits, probs=probs).ignore(padding_mask)

    def extra_repr(self) -> str:
        """Show the sizes in ``print(gate)``."""
        return f"{super().extra_repr()}, k={self.k}, num_iterations={self.num_iterations}"

    def _less_prices(self, logits: Tensor, padding_mask: Tensor | None) -> Tensor:
        scores = group_positions(logits, self.group_dim)
        padding = None
        if padding_mask is not None:
            padding = group_positions(padding_mask.unsqueeze(-1), self.group_dim)
        less = scores - sinkhorn_prices(scores, self.num_iterations, padding)
        return ungroup_positions(less, logits.shape[:-1], self.group_dim)


def sinkhorn_prices(scores: Tensor, num_iterations: int, padding: Tensor | None = None) -> Tensor:
    """Return the prices by which tokens spread evenly over the experts.

    ``exp(scores - prices)``, with every row scaled to sum 1, has columns of equal sums, nearly
    after few and exactly after many iterations. Prices are known up to a constant.

    Args:
        scores: Scores (G, T, E).
        num_iterations: Scalings of rows and columns.
        padding: True (G, T, 1) at rows that do not count.

    Returns:
        Prices (G, 1, E).
    """
    prices = scores.new_zeros(scores.shape[0], 1, scores.shape[2])
    for _ in range(num_iterations):
        rows = (scores - prices).logsumexp(-1, keepdim=True)
        if padding is not None:
            rows = rows.masked_fill(padding, torch.inf)
        prices = (scores - rows).logsumexp(1, keepdim=True)
        prices = prices.masked_fill(prices.isneginf(), 0)  # no row counts
    return prices
