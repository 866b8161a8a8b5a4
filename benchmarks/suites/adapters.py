"""Gated adapters: what they cost over the plain layer."""

from collections.abc import Iterator

from benchmarks.adapters import gated_lora
from benchmarks.registry import Comparison

TESTS = ("tests/core_gates/ops/test_gated_lora.py", "tests/core_gates/adapters/test_gated_lora.py")
THREADS = 1


def comparisons() -> Iterator[Comparison]:
    """Three and eight adapters, forward, then forward with backward; on one CPU thread."""
    for backward in (False, True):
        for num_adapters in (3, 8):
            yield gated_lora(num_adapters, backward=backward)
