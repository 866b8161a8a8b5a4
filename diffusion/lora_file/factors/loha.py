"""LoHa: the element-wise product of two low-rank matrices (Hyeon-Woo et al., 2022).

The product of matrices of ranks r and s has the rank rs at most: its factors are the column-wise
Khatri-Rao products of theirs.
"""

from torch import Tensor

from diffusion.lora_file.factors.kind import (
    Kind,
    Pair,
    Shapes,
    Sizes,
    Stored,
    matrix,
    matrix_shape,
    product_sizes,
)

_PLAIN = frozenset({"w1_a", "w1_b", "w2_a", "w2_b"})


def _build(stored: Stored) -> Pair:
    left, right = _half(stored, 1), _half(stored, 2)
    return Pair(khatri_rao(left.down.T, right.down.T).T, khatri_rao(left.up, right.up))


def _half(stored: Stored, number: int) -> Pair:
    a, b = matrix(stored[f"w{number}_a"]), matrix(stored[f"w{number}_b"])
    if f"t{number}" in stored:  # Tucker: a is (r, out_features)
        return Pair(matrix(stored[f"t{number}"]) @ b, a.T)
    return Pair(b, a)


def khatri_rao(left: Tensor, right: Tensor) -> Tensor:
    """Return the products of all pairs of columns, (n, r) and (n, s) to (n, rs)."""
    return (left[:, :, None] * right[:, None, :]).flatten(1)


def _sizes(shapes: Shapes) -> Sizes:
    """Return the sizes of the pair.

    Raises:
        ValueError: The factors do not fit each other.
    """
    left, right = _half_sizes(shapes, 1), _half_sizes(shapes, 2)
    if left[1:] != right[1:]:
        raise ValueError(
            f"an element-wise product needs matrices of one shape, found {left.out_features}x"
            f"{left.in_features} and {right.out_features}x{right.in_features}"
        )
    return left._replace(rank=left.rank * right.rank)


def _half_sizes(shapes: Shapes, number: int) -> Sizes:
    a, b = matrix_shape(shapes[f"w{number}_a"]), shapes[f"w{number}_b"]
    core = shapes.get(f"t{number}")
    sizes = product_sizes(a if core is None else a[::-1], b, core)
    return sizes if core is None else sizes._replace(rank=a[0])


LOHA = Kind(
    "loha",
    (_PLAIN, _PLAIN | {"t1", "t2"}),
    _build,
    _sizes,
    lambda shapes: shapes["w1_b"][0],
)
