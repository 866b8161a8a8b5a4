"""DoRA: a direction, the weight with its low-rank change, and a magnitude (Liu et al., 2024)."""

import torch
from torch import Tensor


def magnitude_matrix(stored: Tensor) -> Tensor:
    """Return the magnitudes as (out_features, 1), of rows, or (1, in_features), of columns.

    PEFT stores a vector with one entry per row; LyCORIS a matrix of either kind.

    Raises:
        ValueError: The shape is none of them.
    """
    if stored.dim() == 4 and stored.shape[2:] == (1, 1):
        stored = stored[:, :, 0, 0]
    if stored.dim() == 1:
        return stored[:, None]
    if stored.dim() != 2 or 1 not in stored.shape:
        raise ValueError(
            f"the magnitude of DoRA is {'x'.join(map(str, stored.shape))}, expected one row or "
            "one column"
        )
    return stored


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
