"""The hard concrete distribution, on [0, 1] with positive probability of either end."""

import math
from typing import NamedTuple

from torch import Tensor

from core_gates.errors import check_positive


class HardConcrete(NamedTuple):
    """A binary concrete distribution, stretched and clipped (Louizos et al., 2018).

    Attributes:
        beta: Temperature β of the concrete distribution.
        gamma: Lower end γ of the stretched interval, below 0.
        zeta: Upper end ζ, above 1.
    """

    beta: float = 2 / 3
    gamma: float = -0.1
    zeta: float = 1.1

    def check(self) -> None:
        """Refuse parameters that define no such distribution.

        Raises:
            ValueError: β is not positive or the interval does not contain [0, 1].
        """
        check_positive(beta=self.beta)
        if not (self.gamma < 0 and self.zeta > 1):
            raise ValueError(
                f"gamma must be below 0 and zeta above 1, got {self.gamma} and {self.zeta}"
            )

    def sample(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """Return samples (equations 10 and 11).

        Args:
            logits: log α of each gate, any shape.
            uniform: Noise of the same shape between 0 and 1; the ends give 0 and 1.
        """
        noise = uniform.log() - (-uniform).log1p()
        return self._stretched(((noise + logits) / self.beta).sigmoid())

    def deterministic(self, logits: Tensor) -> Tensor:
        """Return the values of evaluation (equation 13)."""
        return self._stretched(logits.sigmoid())

    def open_probability(self, logits: Tensor) -> Tensor:
        """Return the probability that a value is not exactly zero (equation 12)."""
        return (logits - self.beta * math.log(-self.gamma / self.zeta)).sigmoid()

    def _stretched(self, concrete: Tensor) -> Tensor:
        return (concrete * (self.zeta - self.gamma) + self.gamma).clamp(0, 1)
