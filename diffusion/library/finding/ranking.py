"""Exact search: one product with all vectors, and the k best of its scores."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from diffusion.library.store.matrix import Vectors

Scores = NDArray[np.floating]
Positions = NDArray[np.int64]

SLACK = 1e-5
"""More than float32 products of unit vectors are off; what is that close is computed again."""

_EXACT_ROWS = 1 << 12


def dots(matrix: Vectors, query: Vectors) -> Vectors:
    """Return the product of each row (n, dim) with a vector (dim,).

    The matrix may lie on the disk: nothing of it is copied. Rows that are not in use may hold
    anything, NaN included.
    """
    with np.errstate(all="ignore"):
        return matrix @ query


def exact_dots(matrix: Vectors, rows: Positions, query: Vectors) -> NDArray[np.float64]:
    """Return the products of some rows with a vector in float64, equal for equal rows."""
    wide = query.astype(np.float64)
    parts = [
        np.einsum("ij,j->i", matrix[rows[start : start + _EXACT_ROWS]].astype(np.float64), wide)
        for start in range(0, len(rows), _EXACT_ROWS)
    ]
    return np.concatenate(parts) if parts else np.empty(0)


def best(
    scores: Scores, k: int, exact: Callable[[Positions], Scores], slack: float = SLACK
) -> tuple[Positions, Scores]:
    """Return the positions of the k best scores, the best first, and these scores.

    Args:
        scores: Approximate ones (n,).
        k: Positions wanted; fewer if there are fewer.
        exact: Returns the scores of some positions; equal ones go to the lowest position.
        slack: Largest error of an approximate score.
    """
    count = min(k, len(scores))
    if count < 1:
        return np.empty(0, np.int64), np.empty(0)
    place = len(scores) - count
    bound = np.partition(scores, place)[place] - 2 * slack
    near = np.flatnonzero(scores >= bound)
    values = exact(near)
    order = np.lexsort((near, -values))[:count]
    return near[order], values[order]
