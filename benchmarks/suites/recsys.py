"""Ranking: networks, their inputs, scoring, and what watching them costs."""

from collections.abc import Iterator

from benchmarks.recsys import embeddings, home, loading, rechub, serving
from benchmarks.registry import Comparison

TESTS = (
    "tests/core_gates/moe/test_normed_experts.py",
    "tests/core_gates/features/test_low_rank.py",
    "tests/benchmarks/test_recsys.py",
    "tests/benchmarks/test_rechub.py",
    "tests/benchmarks/test_recsys_loader.py",
)
THREADS = 1


def comparisons() -> Iterator[Comparison]:
    """Training, loading, HoME against its matmuls and a loop, tables, candidates, reports."""
    yield from rechub.comparisons()
    yield from loading.comparisons()
    for size in home.SIZES:
        for work in home.SHARES:
            for variant in home.MODES:
                yield home.against_products(size, work, variant)
            yield home.against_loop(size, work)
    yield from embeddings.comparisons()
    yield from serving.comparisons()
    for size in home.SIZES:
        yield serving.reported(size)
