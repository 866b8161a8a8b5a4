"""Definition of ``compress`` and ``extract``: both pick rows, and each is the other's adjoint."""

import torch
from torch import Tensor


def forward(source: Tensor, rows: Tensor, inverse: Tensor) -> Tensor:  # noqa: ARG001
    """Return row ``rows[b, m]`` of every ``source[b]``, and zeros where it is negative.

    Args:
        source: Rows (B, N, D), any dtype.
        rows: Row of every result (B, M), int64; no row is picked twice.
        inverse: Result of every row (B, N), -1 where there is none; what the gradient needs.

    Returns:
        Picked rows (B, M, D).
    """
    batch, num_rows, dim = source.shape
    first = torch.arange(batch, device=rows.device).unsqueeze(-1) * num_rows
    flat = (rows.clamp(min=0) + first).flatten()
    picked = source.reshape(batch * num_rows, dim).index_select(0, flat)
    return picked.view(batch, rows.shape[1], dim).masked_fill((rows < 0).unsqueeze(-1), 0)


def backward(grad: Tensor, rows: Tensor, inverse: Tensor) -> Tensor:
    """Return the gradient (B, N, D) of the source: what went out comes back by the inverse."""
    return forward(grad, inverse, rows)
