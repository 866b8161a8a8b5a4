"""The layout of published gated models: queries and gates from one projection."""

import torch
from torch import Tensor


def split_fused_q_proj(
    fused: Tensor, num_heads: int, num_kv_heads: int, head_dim: int
) -> tuple[Tensor, Tensor]:
    """Cut a fused projection into that of the queries and that of the gates.

    The rows of a fused projection are grouped by key head: the query rows of the heads of its
    group, then their gate rows, one a head (headwise) or one a feature (elementwise).

    Args:
        fused: Weight (R, dim) or bias (R,), where R is H * (D + 1) or H * 2 D.
        num_heads: Query heads H.
        num_kv_heads: Key heads K.
        head_dim: Features D of a head.

    Returns:
        Query rows (H * D, ...) and gate rows (H, ...) or (H * D, ...), both ordered by head.

    Raises:
        ValueError: The rows are not those of such a projection.
    """
    gated = num_heads * head_dim
    known = (gated + num_heads, 2 * gated)
    if num_kv_heads < 1 or num_heads % num_kv_heads or fused.shape[0] not in known:
        raise ValueError(
            f"{fused.shape[0]} rows are not a fused projection of {num_heads} heads of {head_dim}"
            f" features in {num_kv_heads} groups: expected {known[0]} or {known[1]}"
        )
    by_group = _grouped(fused, num_kv_heads)
    queries = gated // num_kv_heads
    return by_group[:, :queries].flatten(0, 1), by_group[:, queries:].flatten(0, 1)


def fuse_q_proj(queries: Tensor, gates: Tensor, num_kv_heads: int) -> Tensor:
    """Undo `split_fused_q_proj`.

    Args:
        queries: Query rows (H * D, ...).
        gates: Gate rows (H, ...) or (H * D, ...).
        num_kv_heads: Key heads K.

    Raises:
        ValueError: K does not divide the rows.
    """
    if num_kv_heads < 1 or queries.shape[0] % num_kv_heads or gates.shape[0] % num_kv_heads:
        raise ValueError(
            f"{queries.shape[0]} query rows and {gates.shape[0]} gate rows do not fall into"
            f" {num_kv_heads} groups"
        )
    grouped = [_grouped(t, num_kv_heads) for t in (queries, gates)]
    return torch.cat(grouped, 1).flatten(0, 1)


def _grouped(rows: Tensor, num_groups: int) -> Tensor:
    return rows.reshape(num_groups, rows.shape[0] // num_groups, *rows.shape[1:])
