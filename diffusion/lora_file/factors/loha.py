"""LoHa: the element-wise product of two low-rank matrices (Hyeon-Woo et al., 2022).

The product of matrices of ranks r and s has the rank rs at most: its factors are the column-wise
Khatri-Rao products of theirs.
"""

from torch import Tensor

from diffusion.lora_file.factors.kind import Kind, Pair, Stored, matrix

_PLAIN = frozenset({"w1_a", "w1_b", "w2_a", "w2_b"})


def _build(stored: Stored) -> Pair:
    left, right = _half(stored, 1), _half(stored, 2)
    return Pair(
        khatri_rao(left.down.T, right.down.T).T,
        khatri_rao(left.up, right.up),
    )


def _half(stored: Stored, number: int) -> Pair:
    a, b = matrix(stored[f"w{number}_a"]), matrix(stored[f"w{number}_b"])
    if f"t{number}" in stored:  # Tucker: a is (r, out_features)
        return Pair(matrix(stored[f"t{number}"]) @ b, a.T)
    return Pair(b, a)


def khatri_rao(left: Tensor, right: Tensor) -> Tensor:
    """Return the products of all pairs of columns, (n, r) and (n, s) to (n, rs).

    Raises:
        ValueError: The matrices differ in their rows.
    """
    if left.shape[0] != right.shape[0]:
        raise ValueError(
            f"the matrices of an element-wise product have {left.shape[0]} and {right.shape[0]} "
            "rows or columns, expected as many"
        )
    return (left[:, :, None] * right[:, None, :]).flatten(1)


LOHA = Kind("loha", (_PLAIN, _PLAIN | {"t1", "t2"}), _build, lambda stored: stored["w1_b"].shape[0])
