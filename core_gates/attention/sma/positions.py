"""Positions in attention over compressed tokens: a table of distances, or rotations."""

import torch
from torch import Tensor, nn


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
        if max_positions < 1:
            raise ValueError(f"max_positions must be at least 1, got {max_positions}")
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


def rotate(x: Tensor, positions: Tensor, *, base: float = 10000.0) -> Tensor:
    """Rotate neighboring pairs of features by angles that grow with the position (Su et al., 2021).

    Pair i turns by ``position base^(-2 i / D)``, so that the product of a rotated query and a
    rotated key depends on their distance alone.

    Args:
        x: Queries or keys (..., N, D), D even.
        positions: Positions (..., N).
        base: Base of the wavelengths.

    Returns:
        Rotated ``x``.

    Raises:
        ValueError: D is odd.
    """
    dim = x.shape[-1]
    if dim % 2:
        raise ValueError(f"rotations turn pairs: the features must be even, got {dim}")
    exact = torch.promote_types(x.dtype, torch.float32)
    pairs = torch.arange(0, dim, 2, device=x.device, dtype=exact)
    angles = positions.unsqueeze(-1).to(exact) * base ** (-pairs / dim)
    even, odd = x.to(exact).reshape(*x.shape[:-1], dim // 2, 2).unbind(-1)
    cos, sin = angles.cos(), angles.sin()
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return turned.flatten(-2).to(x.dtype)
