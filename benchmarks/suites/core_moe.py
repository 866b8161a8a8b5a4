"""The expert layer of the core: speed, peers, and decoding of small batches."""

from benchmarks.core.moe import comparisons

__all__ = ["TESTS", "THREADS", "comparisons"]

TESTS = (
    "tests/core_gates/moe/test_dispatch.py",
    "tests/core_gates/moe/test_experts.py",
    "tests/core_gates/ops/test_grouped_linear.py",
    "tests/core_gates/ops/test_grouped_mlp.py",
    "tests/core_gates/ops/test_router.py",
)
THREADS = 1
