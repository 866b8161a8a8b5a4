"""What every encoder of histories is.

B rows, L events, d features of an item, W features that are kept of an event, O of the result.
"""

from abc import ABC, abstractmethod

from torch import Tensor, nn


class HistoryEncoder(nn.Module, ABC):
    """From the embeddings of past items (B, L, d) to one vector (B, O); newest event last.

    What depends on the history alone, ``states``, is computed once for all candidates; ``pooled``
    follows for each. A history without events gives a finite vector with finite gradients.

    Args:
        dim: Features d of an item.
        out_dim: Features O of the result.

    Attributes:
        needs_target: Whether the result depends on the item to be ranked.
    """

    needs_target = False

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.dim, self.out_dim = dim, out_dim

    def states(self, events: Tensor, mask: Tensor) -> Tensor:  # noqa: ARG002
        """Return what is kept of each event (B, L, W); the events themselves here.

        Args:
            events: Embeddings (B, L, d).
            mask: True (B, L) where there is an event.
        """
        return events

    @abstractmethod
    def pooled(self, states: Tensor, mask: Tensor, target: Tensor | None) -> Tensor:
        """Return one vector (B, O).

        Args:
            states: From :meth:`states` (B, L, W); (1, L, W) of one user for B targets.
            mask: True where there is an event, (B, L) or (1, L).
            target: Embedding of the item to be ranked (B, d), where it is needed.
        """

    def forward(self, events: Tensor, mask: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the vectors (B, O) of histories, see :meth:`states` and :meth:`pooled`."""
        return self.pooled(self.states(events, mask), mask, target)
