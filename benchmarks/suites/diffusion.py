"""Gated adapters in transformers of FLUX.1, and libraries of adapters."""

from collections.abc import Iterator

from benchmarks.diffusion.block import block
from benchmarks.diffusion.scan import rescan
from benchmarks.diffusion.search import search
from benchmarks.diffusion.tiny_flux import tiny_flux
from benchmarks.registry import Comparison

TESTS = (
    "tests/diffusion/fusion/test_gated_fusion.py",
    "tests/diffusion/library/test_searcher.py",
    "tests/benchmarks/test_diffusion.py",
)
THREADS = 1


def comparisons() -> Iterator[Comparison]:
    """A block at full size, the embedded FLUX, search and scans; on one CPU thread."""
    for num_adapters in (3, 8):
        yield block(num_adapters)
    for num_adapters in (3, 8):
        yield tiny_flux(num_adapters)
    yield search()
    yield rescan()
