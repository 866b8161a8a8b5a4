"""Endoscopy: training steps of gradient routing, and reading frames."""

from collections.abc import Iterator

from benchmarks.endoscopy import cache, gradient_routing
from benchmarks.registry import Comparison

TESTS = (
    "tests/core_gates/test_gradient_routing.py",
    "tests/endoscopy/test_targets.py",
    "tests/endoscopy/data/test_cache.py",
)
THREADS = 1


def comparisons() -> Iterator[Comparison]:
    """Training steps, then frames; all on one CPU thread."""
    for case in gradient_routing.CASES:
        yield gradient_routing.gradient_routing(case)
    yield cache.cached_read()
