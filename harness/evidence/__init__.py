"""Evidence: rows, intervals, paired differences and corrections, computed with numpy only."""

from harness.evidence.rows import Bar, Row

__all__ = ["Bar", "Row"]
