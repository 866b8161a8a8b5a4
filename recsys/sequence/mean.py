"""The mean of past items."""

from torch import Tensor

from recsys.sequence.encoder import HistoryEncoder


class MeanEncoder(HistoryEncoder):
    """The mean of the embeddings of all events; zeros where there are none.

    Args:
        dim: Features d of an item, and of the result.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim)

    def pooled(self, states: Tensor, mask: Tensor, target: Tensor | None) -> Tensor:  # noqa: ARG002
        """Return the means (B, d)."""
        weights = mask.to(states.dtype)
        total = (weights.unsqueeze(1) @ states).squeeze(1)
        return total / weights.sum(1, keepdim=True).clamp(min=1)
