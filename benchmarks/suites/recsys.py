"""Ranking: networks against the limits of the machine and against other implementations."""

from collections.abc import Iterator

from benchmarks.recsys import networks
from benchmarks.registry import Comparison

TESTS = (
    "tests/core_gates/moe/test_normed_experts.py",
    "tests/core_gates/features/test_low_rank.py",
    "tests/benchmarks/test_recsys.py",
)
THREADS = 1


def comparisons() -> Iterator[Comparison]:
    """HoME against its own matmuls and against a loop; all on one CPU thread."""
    for size in networks.SIZES:
        for work in networks.SHARES:
            yield networks.against_products(size, work)
            yield networks.against_loop(size, work)
