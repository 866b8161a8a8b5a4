"""What an evaluation leaves: figures of methods on tasks, and bars that they must reach."""

import math
from typing import Literal, NamedTuple

from harness.evidence.interval import ALPHA, excludes_zero


class Row(NamedTuple):
    """One figure of one method on one task.

    Attributes:
        method: What was scored, for example ``top2``.
        task: On what, for example ``test``.
        metric: Which figure, with its unit where it has one, for example ``mae_mm``.
        value: The figure; NaN where there is none.
        low: Lower end of its 95 % interval.
        high: Upper end.
        n: Independent units that the interval is based on.
        versus: Method that was subtracted, where the figure is a paired difference; else empty.
        p: Probability of so large a difference by chance, corrected by Holm; NaN where none.
    """

    method: str
    task: str
    metric: str
    value: float
    low: float = math.nan
    high: float = math.nan
    n: int = 1
    versus: str = ""
    p: float = math.nan

    @property
    def label(self) -> str:
        """The method, or ``method − versus`` of a difference."""
        return f"{self.method} − {self.versus}" if self.versus else self.method

    @property
    def significant(self) -> bool:
        """Whether this is a difference whose interval excludes zero and whose p is below 0.05."""
        return excludes_zero(self.low, self.high) and self.p < ALPHA


class Bar(NamedTuple):
    """A figure that must not lie above, or below, a bar.

    Attributes:
        name: What is claimed.
        value: The figure; NaN counts as missed.
        sense: ``<=`` or ``>=``.
        bar: The bar.
        unit: Unit of figure and bar.
    """

    name: str
    value: float
    sense: Literal["<=", ">="]
    bar: float
    unit: str = ""

    @property
    def met(self) -> bool:
        """Whether the figure is on the right side of the bar."""
        return self.value <= self.bar if self.sense == "<=" else self.value >= self.bar
