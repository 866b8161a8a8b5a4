"""Attention of the item to be ranked to past items, as in the deep interest network."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_gates.errors import check_at_least
from recsys.sequence.encoder import HistoryEncoder


class TargetAttention(HistoryEncoder):
    """A weighted sum of past items, the weights from a network of event and target (DIN).

    ``Σ_l a_l h_l`` with ``a_l = w SiLU(W [h_l, t, h_l − t, h_l ⊙ t] + b) + c`` (Zhou et al., KDD
    2018, section 4.3, there with PReLU or Dice). W splits into a matrix for h, one for t and one
    for their product, so that what depends on one of them alone is computed once. Without events
    the result is zero.

    Args:
        dim: Features d of an item, and of the result.
        hidden_dim: Features of the hidden layer.
        softmax: Whether the weights are normalized over the events; not in the paper, whose weights
            keep how strongly the history speaks for the target.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Raises:
        ValueError: A size is below 1.
    """

    needs_target = True

    def __init__(
        self,
        dim: int,
        *,
        hidden_dim: int = 32,
        softmax: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_at_least(1, dim=dim, hidden_dim=hidden_dim)
        super().__init__(dim, dim)
        self.softmax = softmax
        self.hidden = nn.Linear(4 * dim, hidden_dim, device=device, dtype=dtype)
        self.score = nn.Linear(hidden_dim, 1, device=device, dtype=dtype)

    def pooled(self, states: Tensor, mask: Tensor, target: Tensor | None) -> Tensor:
        """Return the weighted sums (B, d) of events (B, L, d), or (1, L, d) of one user.

        Raises:
            ValueError: There is no target.
        """
        if target is None:
            raise ValueError("target attention needs the embedding of the item to be ranked")
        return (self.weights(states, mask, target).unsqueeze(1) @ states).squeeze(1)

    def weights(self, events: Tensor, mask: Tensor, target: Tensor) -> Tensor:
        """Return the weight (B, L) of each event, zero where there is none."""
        event, item, difference, product = self.hidden.weight.chunk(4, 1)
        of_event = F.linear(events, event + difference, self.hidden.bias)
        of_target = F.linear(target, item - difference).unsqueeze(1)
        both = F.linear(events * target.unsqueeze(1), product)
        scores = self.score(F.silu(of_event + of_target + both)).squeeze(-1)
        if not self.softmax:
            return scores * mask
        lowest = torch.finfo(scores.dtype).min
        return scores.masked_fill(~mask, lowest).softmax(1) * mask
