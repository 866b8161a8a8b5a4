"""Groups of tokens that compete with each other for experts."""

import math

import torch
from torch import Tensor


def group_positions(values: Tensor, group_dim: int | None) -> Tensor:
    """Return (G, T, K): G groups of T tokens each.

    Args:
        values: Values of the tokens (..., K).
        group_dim: Dimension of ``values`` along which tokens compete; None for one group of all
            tokens.

    Raises:
        ValueError: ``group_dim`` is not a dimension of tokens.
    """
    if group_dim is None:
        return values.reshape(1, math.prod(values.shape[:-1]), values.shape[-1])
    _check_dim(group_dim, values.ndim)
    moved = values.movedim(group_dim, -2)
    return moved.reshape(math.prod(moved.shape[:-2]), *moved.shape[-2:])


def ungroup_positions(values: Tensor, leading: torch.Size, group_dim: int | None) -> Tensor:
    """Undo :func:`group_positions`.

    Args:
        values: Grouped values (G, T, K).
        leading: Shape of the tokens, that of the ungrouped values without K.
        group_dim: As in :func:`group_positions`.

    Returns:
        Values (..., K).
    """
    if group_dim is None:
        return values.reshape(*leading, values.shape[-1])
    others = list(leading)
    length = others.pop(group_dim % (len(leading) + 1))
    return values.reshape(*others, length, values.shape[-1]).movedim(-2, group_dim)


def _check_dim(group_dim: int, num_dims: int) -> None:
    if not -num_dims <= group_dim < num_dims or group_dim % num_dims == num_dims - 1:
        raise ValueError(
            f"group_dim must be a dimension of the {num_dims - 1} before the features, got"
            f" {group_dim}"
        )
