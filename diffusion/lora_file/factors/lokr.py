"""LoKr: the Kronecker product of two matrices, each whole or factored (LyCORIS; Yeh et al., 2024).

With W₁ = B₁A₁ and W₂ = B₂A₂ it is (B₁ ⊗ B₂)(A₁ ⊗ A₂); a whole matrix is a factor of itself and of
the identity on its shorter side.
"""

import torch
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

_FIRST = ({"k1"}, {"k1_a", "k1_b"})
_SECOND = ({"k2"}, {"k2_a", "k2_b"}, {"k2_t", "k2_a", "k2_b"})


def _build(stored: Stored) -> Pair:
    first, second = _half(stored, "k1"), _half(stored, "k2")
    return Pair(kronecker(first.down, second.down), kronecker(first.up, second.up))


def _half(stored: Stored, name: str) -> Pair:
    if name in stored:
        return whole(matrix(stored[name]))
    a, b = matrix(stored[f"{name}_a"]), matrix(stored[f"{name}_b"])
    if f"{name}_t" in stored:  # Tucker: a is (r, out_features)
        return Pair(matrix(stored[f"{name}_t"]) @ b, a.T)
    return Pair(b, a)


def kronecker(left: Tensor, right: Tensor) -> Tensor:
    """Return the Kronecker product of two matrices; ``torch.kron`` takes no transposed ones."""
    rows, columns = left.shape[0] * right.shape[0], left.shape[1] * right.shape[1]
    return (left[:, None, :, None] * right[None, :, None, :]).reshape(rows, columns)


def whole(weight: Tensor) -> Pair:
    """Return a matrix as the factors weight · I or I · weight, whichever rank is smaller."""
    outputs, inputs = weight.shape
    identity = torch.eye(min(outputs, inputs), dtype=weight.dtype)
    return Pair(identity, weight) if inputs <= outputs else Pair(weight, identity)


def _sizes(shapes: Shapes) -> Sizes:
    """Return the sizes of the pair.

    Raises:
        ValueError: The factors do not fit each other.
    """
    first, second = _half_sizes(shapes, "k1"), _half_sizes(shapes, "k2")
    return Sizes(*(a * b for a, b in zip(first, second, strict=True)))


def _half_sizes(shapes: Shapes, name: str) -> Sizes:
    if name in shapes:
        outputs, inputs = matrix_shape(shapes[name])
        return Sizes(min(outputs, inputs), inputs, outputs)
    a, b = matrix_shape(shapes[f"{name}_a"]), shapes[f"{name}_b"]
    core = shapes.get(f"{name}_t")
    sizes = product_sizes(a if core is None else a[::-1], b, core)
    return sizes if core is None else sizes._replace(rank=a[0])


def _rank(shapes: Shapes) -> int | None:
    """Return the rank of the factored matrix, the second one if both are; None if none is."""
    for name in ("k2_b", "k1_b"):
        if name in shapes:
            return shapes[name][0]
    return None


LOKR = Kind("lokr", [frozenset(a | b) for a in _FIRST for b in _SECOND], _build, _sizes, _rank)
