"""Bootstrap intervals of a score, and of the difference of two methods."""

from typing import NamedTuple

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
