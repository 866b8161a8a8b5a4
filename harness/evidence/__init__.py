"""Evidence: rows, intervals, paired differences and corrections, computed with numpy only."""

from harness.evidence.bootstrap import Resamples
from harness.evidence.compare import compare
from harness.evidence.direction import smaller_is_better
from harness.evidence.interval import Difference, Interval
from harness.evidence.moments import Scores, moments, root, root_ratio
from harness.evidence.rows import Bar, Row
from harness.evidence.significance import holm, sign_test

__all__ = [
    "Bar",
    "Difference",
    "Interval",
    "Resamples",
    "Row",
    "Scores",
    "compare",
    "holm",
    "moments",
    "root",
    "root_ratio",
    "sign_test",
    "smaller_is_better",
]
