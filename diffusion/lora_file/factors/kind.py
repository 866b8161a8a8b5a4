"""What all kinds of factors have in common."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

Stored = Mapping[str, Tensor]
"""Tensors of a layer by role, such as ``down``."""


class Pair(NamedTuple):
    """Factors A (r, in_features) and B (out_features, r) of a change BA, without its scale."""

    down: Tensor
    up: Tensor


class Kind(NamedTuple):
    """A way to store the change of a layer.

    Attributes:
        name: Such as ``lora``.
        forms: Sets of roles, each of which is complete.
        build: Returns the pair from tensors by role; works on meta tensors, too.
        rank: Returns what α is divided by; None where the kind uses no α.
    """

    name: str
    forms: Sequence[frozenset[str]]
    build: Callable[[Stored], Pair]
    rank: Callable[[Stored], int | None]

    @property
    def roles(self) -> frozenset[str]:
        """Every role that occurs in a form."""
        return frozenset().union(*self.forms)


def matrix(tensor: Tensor) -> Tensor:
    """Return a matrix, also of a 1 × 1 convolution.

    Raises:
        ValueError: It is neither.
    """
    if tensor.dim() == 4 and tensor.shape[2:] == (1, 1):
        return tensor[:, :, 0, 0]
    if tensor.dim() != 2:
        what = "x".join(map(str, tensor.shape)) or "a number"
        raise ValueError(f"a factor is {what}, expected a matrix or a 1x1 convolution")
    return tensor
