"""Embedding tables of 8-bit integers, for serving."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Int8Tables(nn.Module):
    """Rows of 8-bit integers with a scale each: a quarter of the memory of float32.

    Row r is ``scale_r q_r`` with ``scale_r = max |w_r| / 127`` and q rounded to the nearest
    integer, so that no number is off by more than half a scale, max |w_r| / 254.

    Args:
        num_embeddings: Number of rows.
        embedding_dim: Features d of a row.
        dtype: Floating dtype of the vectors.
        device: Device of the rows.

    Shape:
        Row numbers (...) to vectors (..., d).
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        rows = torch.zeros(num_embeddings, embedding_dim, dtype=torch.int8, device=device)
        self.register_buffer("rows", rows)
        self.register_buffer("scales", torch.zeros(num_embeddings, dtype=dtype, device=device))
        self.rows: Tensor
        self.scales: Tensor

    @classmethod
    def of(cls, table: Tensor) -> Self:
        """Return a table (rows, d), rounded."""
        made = cls(*table.shape, dtype=table.dtype, device=table.device)
        rows, scales = rounded(table)
        made.rows.copy_(rows)
        made.scales.copy_(scales)
        return made

    @property
    def weight(self) -> Tensor:
        """All rows as floating-point numbers."""
        return restored(self.rows, self.scales)

    def forward(self, rows: Tensor) -> Tensor:
        """Return the vectors (..., d) of rows (...), int64."""
        return F.embedding(rows, self.rows).to(self.scales.dtype) * self.scales[rows][..., None]


def rounded(table: Tensor) -> tuple[Tensor, Tensor]:
    """Return the integers (rows, d) and scales (rows,) of a table."""
    table = table.detach()
    scales = table.abs().amax(1) / 127
    safe = torch.where(scales > 0, scales, 1)
    return (table / safe[:, None]).round().clamp(-127, 127).to(torch.int8), scales


def restored(rows: Tensor, scales: Tensor) -> Tensor:
    """Return the table (rows, d) of integers and scales."""
    return rows.to(scales.dtype) * scales[:, None]
