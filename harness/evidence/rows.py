"""What an evaluation leaves: figures of methods with their intervals, and bars for them."""

import math
import re
from typing import Literal, NamedTuple

SMALLER = {"loss", "error", "bits", "rmse", "mae", "mse", "mape", "crps", "brier", "ne"}
LARGER = {"auc", "gauc", "accuracy", "precision", "recall", "sensitivity", "specificity",
          "ndcg", "dice", "iou", "f1"}  # fmt: skip
NEITHER = {"ratio", "bias", "rate", "probability"}  # best at some value, or no matter of quality


def smaller_is_better(metric: str) -> bool | None:
    """Return whether a metric is better when small; None where its name does not tell.

    Args:
        metric: Its name, such as ``summed log_loss`` or ``rmse_z500``.
    """
    words = set(re.split(r"[^a-z0-9]+", metric.lower()))
    small, large = bool(words & SMALLER), bool(words & LARGER)
    return None if small == large or words & NEITHER else small


ALPHA = 0.05  # largest probability that still counts as significant


class Interval(NamedTuple):
    """A score with a percentile interval.

    Attributes:
        value: Score of the whole sample, the mean over seeds if there are several.
        low: Lower percentile of the resampled scores; NaN where nothing can be said.
        high: Upper percentile.
        units: Number of independent units, the clusters or blocks that were drawn.
    """

    value: float
    low: float
    high: float
    units: int


class Difference(NamedTuple):
    """A score of one method minus that of another on the same samples.

    Attributes:
        value: Difference on the whole sample, the mean over seeds if there are several.
        low: Lower percentile of the resampled differences; NaN where nothing can be said.
        high: Upper percentile.
        p: Two-sided probability of so large a difference by chance.
        units: Number of independent units, the clusters or blocks that were drawn.
    """

    value: float
    low: float
    high: float
    p: float
    units: int

    @property
    def significant(self) -> bool:
        """Whether the interval excludes zero and p is below 0.05."""
        return excludes_zero(self.low, self.high) and self.p < ALPHA


def excludes_zero(low: float, high: float) -> bool:
    """Whether all of an interval lies on one side of zero; never with a NaN."""
    return low > 0 or high < 0


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
        note: What a reader must be told instead of a figure, such as how to train a network.
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
    note: str = ""

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
        value: The figure; NaN counts as missed, unless there is a note.
        sense: ``<=`` or ``>=``.
        bar: The bar.
        unit: Unit of figure and bar.
        note: Why there is no figure; then it is neither met nor missed.
    """

    name: str
    value: float
    sense: Literal["<=", ">="]
    bar: float
    unit: str = ""
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the figure is on the right side of the bar; None where it was not measured."""
        if self.note:
            return None
        return bool(self.value <= self.bar if self.sense == "<=" else self.value >= self.bar)
