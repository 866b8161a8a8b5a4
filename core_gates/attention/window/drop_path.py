"""Stochastic depth: a residual branch that is sometimes left out."""

from torch import Tensor, nn

from core_gates.errors import check_fraction


class DropPath(nn.Module):
    """Drop the branch of whole samples while training (Huang et al., 2016, stochastic depth).

    Kept branches are scaled by ``1 / (1 - rate)``, so that the expectation is unchanged.

    Args:
        rate: Probability that a sample loses the branch.

    Shape:
        ``x`` (B, ...) to the same shape.

    Raises:
        ValueError: ``rate`` lies outside [0, 1).
    """

    def __init__(self, rate: float = 0.0) -> None:
        check_fraction(rate=rate)
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``, or while training ``x`` with dropped samples set to zero."""
        if self.rate == 0 or not self.training:
            return x
        keep = 1 - self.rate
        return x * x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        """Show the rate."""
        return f"rate={self.rate}"
