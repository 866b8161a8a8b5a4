"""A learned bias for the distance between two tokens."""

import torch
from torch import Tensor, nn

from core_gates.errors import check_at_least


class DistanceBias(nn.Module):
    """Look up a learned bias for the distance of a key from its query (Raffel et al., 2020).

    Distances beyond either end of the table take the entry at that end.

    Args:
        max_positions: Distances from 1 - max_positions to max_positions - 1 have entries.
        device: Device of the table.
        dtype: Floating dtype of the table.

    Shape:
        Distances of any shape, int64, key minus query; biases of the same shape.

    Raises:
        ValueError: ``max_positions`` is below 1.
    """

    def __init__(
        self,
        max_positions: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least(1, max_positions=max_positions)
        self.max_positions = max_positions
        self.table = nn.Parameter(torch.empty(2 * max_positions - 1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table from N(0, 0.02²)."""
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, distance: Tensor) -> Tensor:
        """Return the bias of every distance."""
        entries = (distance + self.max_positions - 1).clamp(0, 2 * self.max_positions - 2)
        return self.table.index_select(0, entries.flatten()).view(entries.shape)
