"""What all kinds of factors have in common."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

Stored = Mapping[str, Tensor]
"""Tensors of a layer by role, such as ``down``."""

Shapes = Mapping[str, Sequence[int]]
"""Shapes of the tensors of a layer by role."""


class Pair(NamedTuple):
    """Factors A (r, in_features) and B (out_features, r) of a change BA, without its scale."""

    down: Tensor
    up: Tensor


class Sizes(NamedTuple):
    """Sizes of a pair of factors."""

    rank: int
    in_features: int
    out_features: int


class Kind(NamedTuple):
    """A way to store the change of a layer.

    Attributes:
        name: Such as ``lora``.
        forms: Sets of roles, each of which is complete.
        build: Returns the pair from tensors by role.
        sizes: Returns the sizes of that pair from shapes alone; raises ValueError if they do not
            fit each other.
        rank: Returns what α is divided by, from shapes; None where the kind uses no α.
    """

    name: str
    forms: Sequence[frozenset[str]]
    build: Callable[[Stored], Pair]
    sizes: Callable[[Shapes], Sizes]
    rank: Callable[[Shapes], int | None]

    @property
    def roles(self) -> frozenset[str]:
        """Every role that occurs in a form."""
        return frozenset().union(*self.forms)


def matrix(tensor: Tensor) -> Tensor:
    """Return a matrix, also of a 1 × 1 convolution."""
    return tensor[:, :, 0, 0] if tensor.dim() == 4 else tensor


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return the shape of a matrix, also of a 1 × 1 convolution.

    Raises:
        ValueError: It is neither.
    """
    if len(shape) == 4 and tuple(shape[2:]) == (1, 1):
        return shape[0], shape[1]
    if len(shape) != 2:
        what = "x".join(map(str, shape)) or "a number"
        raise ValueError(f"a factor is {what}, expected a matrix or a 1x1 convolution")
    return shape[0], shape[1]


def product_sizes(up: Sequence[int], down: Sequence[int], core: Sequence[int] | None) -> Sizes:
    """Return the sizes of the product up · core · down of matrices.

    Raises:
        ValueError: They do not fit each other.
    """
    (outputs, left), (right, inputs) = matrix_shape(up), matrix_shape(down)
    inner = (left, right) if core is None else matrix_shape(core)
    if inner != (left, right) or (core is None and left != right):
        middle = "" if core is None else f", {inner[0]}x{inner[1]}"
        raise ValueError(
            f"factors of {outputs}x{left}{middle} and {right}x{inputs} do not fit each other"
        )
    return Sizes(right, inputs, outputs)
