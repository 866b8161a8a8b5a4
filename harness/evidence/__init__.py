"""Evidence: rows, intervals, paired differences and corrections, computed with numpy only."""

from harness.evidence.bootstrap import Resamples
from harness.evidence.compare import compare
from harness.evidence.direction import smaller_is_better
from harness.evidence.interval import Difference, Interval
from harness.evidence.moments import Scores, SingleUnit, moments, root, root_ratio, single_of
from harness.evidence.rows import Bar, Row
from harness.evidence.significance import holm

__all__ = [
    "Bar",
    "Difference",
    "Interval",
    "Resamples",
    "Row",
    "Scores",
    "SingleUnit",
    "compare",
    "holm",
    "moments",
    "root",
    "root_ratio",
    "single_of",
    "smaller_is_better",
]
