"""DoRA: a direction, the weight with its low-rank change, and a magnitude (Liu et al., 2024)."""

from collections.abc import Sequence

import torch
from torch import Tensor


def magnitude_matrix(stored: Tensor) -> Tensor:
    """Return the magnitudes as (out_features, 1), of rows, or (1, in_features), of columns.

    PEFT stores a vector with one entry per row; LyCORIS a matrix of either kind.
    """
    return stored.reshape(magnitude_shape(stored.shape))


def magnitude_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return the shape of magnitudes as a matrix.

    Raises:
        ValueError: It is neither one row nor one column.
    """
    if len(shape) == 4 and tuple(shape[2:]) == (1, 1):
        shape = shape[:2]
    if len(shape) == 1:
        return shape[0], 1
    if len(shape) != 2 or 1 not in shape:
        found = "x".join(map(str, shape)) or "a number"
        raise ValueError(f"the magnitude of DoRA is {found}, expected one row or one column")
    return shape[0], shape[1]


def merged_weight(weight: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """Return the weight of a layer with a DoRA adapter, m · (W + ΔW) / ‖W + ΔW‖.

    Args:
        weight: W (out_features, in_features).
        delta: ΔW, of the same shape.
        magnitude: m, (out_features, 1) for norms of rows or (1, in_features) for those of columns.
    """
    changed = weight + delta
    norm = torch.linalg.vector_norm(changed, dim=1 if magnitude.shape[1] == 1 else 0, keepdim=True)
    return magnitude * changed / norm.clamp_min(torch.finfo(norm.dtype).tiny)
