"""Everything of the core, on one CPU thread; each part is a separate suite, too."""

from collections.abc import Iterator

from benchmarks.registry import Comparison
from benchmarks.suites import adapters, core_attention, core_moe, core_ops

TESTS = (*core_moe.TESTS, *adapters.TESTS, *core_attention.TESTS, *core_ops.TESTS)
THREADS = 1


def comparisons() -> Iterator[Comparison]:
    """The expert layer, gated LoRA, sparse attention and the element-wise ops."""
    yield from core_moe.comparisons()
    yield from adapters.comparisons()
    yield from core_attention.comparisons()
    yield from core_ops.comparisons("cpu")
