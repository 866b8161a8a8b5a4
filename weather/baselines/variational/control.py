"""Control variables: a square root U of the background-error covariance, ``B = U U'``."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class ControlVariable(Protocol):
    """A linear map U from control vectors of unit variance to increments of a state.

    Attributes:
        size: n = C H W, values of a flattened state.
        num_controls: k, values of a control vector.
    """

    size: int
    num_controls: int

    def increment(self, control: Tensor) -> Tensor:
        """Return ``U v`` (N, n) of control vectors (N, k), float64, differentiable."""
        ...


class DenseControl:
    """The symmetric square root of a covariance matrix, for states of some thousand values.

    Args:
        matrix: B (n, n); eigenvalues below zero, which rounding leaves, count as zero.

    Raises:
        ValueError: The matrix is not square.
    """

    def __init__(self, matrix: Tensor) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"expected a square matrix, found shape {tuple(matrix.shape)}")
        values, vectors = torch.linalg.eigh(matrix.double())
        self._root = (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T
        self.size = self.num_controls = len(matrix)

    def increment(self, control: Tensor) -> Tensor:
        """Return ``U v`` (N, n) of control vectors (N, n)."""
        return control @ self._root


def adjoint_increment(control: ControlVariable, states: Tensor) -> Tensor:
    """Return ``U' x`` (N, k) of states (N, n), by autograd."""
    origin = states.new_zeros(len(states), control.num_controls).requires_grad_()
    with torch.enable_grad():
        product = (control.increment(origin) * states).sum()
        (adjoint,) = torch.autograd.grad(product, origin)
    return adjoint
