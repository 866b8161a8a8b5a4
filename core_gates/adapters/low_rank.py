"""The factors of a plain low-rank adapter."""

from typing import NamedTuple

from torch import Tensor


class LowRank(NamedTuple):
    """A LoRA of one linear layer: it adds ``scale * up @ down`` to the weight (Hu et al., 2022).

    Attributes:
        down: First factor A (r, in_features).
        up: Second factor B (out_features, r).
        scale: α/r, or α/√r for rank-stabilized adapters.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Number of components r."""
        return self.down.shape[0]

    def delta_weight(self) -> Tensor:
        """Return what the adapter adds to the weight (out_features, in_features)."""
        return self.scale * (self.up @ self.down)

    def check(self, in_features: int, out_features: int) -> None:
        """Refuse factors that do not belong to a layer of these sizes or to each other.

        Raises:
            ValueError: A shape does not fit.
        """
        rank = self.down.shape[0]
        if self.down.shape != (rank, in_features) or self.up.shape != (out_features, rank):
            raise ValueError(
                f"factors {tuple(self.down.shape)} and {tuple(self.up.shape)} do not fit a layer of"
                f" {in_features} inputs and {out_features} outputs: expected (r, {in_features}) and"
                f" ({out_features}, r)"
            )
