"""Evidence: rows, intervals, paired differences and corrections, computed with numpy only."""

from harness.evidence.bootstrap import (
    Resamples,
    Scores,
    SingleUnit,
    moments,
    root,
    root_ratio,
    single_of,
)
from harness.evidence.compare import compare, holm
from harness.evidence.rows import Bar, Difference, Interval, Row, smaller_is_better

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
