"""The canonical change of one layer."""

from typing import NamedTuple

import torch
from torch import Tensor

from core_gates.adapters.low_rank import LowRank
from diffusion.lora_file.errors import LoraFileError
from diffusion.lora_file.factors.dora import merged_weight

COLUMNS = "norms of columns of a fused layer belong to all of its parts and cannot be split"


class Factors(NamedTuple):
    """What an adapter does to one linear layer, whatever the file stored.

    Attributes:
        down: A (r, in_features).
        up: B (out_features, r).
        scale: α/r, or α/√r for rank-stabilized adapters.
        magnitude: Of DoRA, (out_features, 1) or (1, in_features); None for all others.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """Number of components r."""
        return self.down.shape[0]

    @property
    def in_features(self) -> int:
        """Inputs of the layer."""
        return self.down.shape[1]

    @property
    def out_features(self) -> int:
        """Outputs of the layer."""
        return self.up.shape[0]

    def delta_weight(self, weight: Tensor | None = None) -> Tensor:
        """Return what the adapter adds to the weight (out_features, in_features).

        Args:
            weight: That of the base, which DoRA needs.

        Raises:
            LoraFileError: It is a DoRA adapter and no weight is given.
        """
        delta = self.scale * _product(self.up, self.down)
        if self.magnitude is None:
            return delta
        if weight is None:
            raise LoraFileError(
                "what DoRA adds depends on the weight of the base: name a base, or read "
                "the direction from low_rank()"
            )
        return merged_weight(weight, delta, self.magnitude) - weight

    def low_rank(self) -> LowRank:
        """Return the pair of factors, for DoRA that of the direction."""
        return LowRank(self.down, self.up, self.scale)

    def norm(self) -> float:
        """Return ‖scale · BA‖ (Frobenius) from the Gram matrices of the factors, in float64."""
        if _is_identity(self.down) or _is_identity(self.up):
            product = _product(self.up, self.down).double()
            return abs(self.scale) * float(torch.linalg.vector_norm(product))
        down, up = self.down.double(), self.up.double()
        square = torch.sum((up.T @ up) * (down @ down.T)).clamp_min(0)
        return abs(self.scale) * float(square.sqrt())

    def rows(self, start: int, stop: int) -> "Factors":
        """Return the factors of some outputs.

        Raises:
            LoraFileError: A DoRA adapter holds norms of columns, which all rows share.
        """
        magnitude = self.magnitude
        if magnitude is not None:
            if magnitude.shape[1] != 1:
                raise LoraFileError(COLUMNS)
            magnitude = magnitude[start:stop]
        return Factors(self.down, self.up[start:stop], self.scale, magnitude)

    def swapped(self) -> "Factors":
        """Return the factors with the halves of the outputs exchanged."""

        def exchange(tensor: Tensor) -> Tensor:
            return torch.cat(tensor.chunk(2)[::-1])

        magnitude = self.magnitude
        if magnitude is not None and magnitude.shape[1] == 1:
            magnitude = exchange(magnitude)
        return Factors(self.down, exchange(self.up), self.scale, magnitude)


def _product(up: Tensor, down: Tensor) -> Tensor:
    """Return BA; whole matrices of LoKr have the identity as other factor, which costs nothing."""
    if _is_identity(down):
        return up
    return down if _is_identity(up) else up @ down


def _is_identity(matrix: Tensor) -> bool:
    rows, columns = matrix.shape
    if rows != columns or matrix[0, 0] != 1 or matrix[-1, 0] != (rows == 1):
        return False
    return torch.equal(matrix, torch.eye(rows, dtype=matrix.dtype))
