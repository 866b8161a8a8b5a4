"""Endoscopy: gated seams and training steps, reading frames, and rendering them."""

from collections.abc import Iterator

from benchmarks.endoscopy import cached_frames, gated_steps, rendering
from benchmarks.registry import Comparison

TESTS = (
    "tests/core_gates/training/test_gradient_routing.py",
    "tests/core_gates/training/test_gradient_routing_state.py",
    "tests/endoscopy/training/test_targets.py",
    "tests/endoscopy/data/test_frame_cache.py",
    "tests/core_gates/ops/test_gated_residual_norm.py",
    "tests/benchmarks/test_eager_renderer.py",
    "tests/endoscopy/renderer/test_march.py",
)
THREADS = 1


def comparisons() -> Iterator[Comparison]:
    """The seam of a block, training steps, then frames; all on one CPU thread."""
    yield gated_steps.gated_residual_norm()
    for case in gated_steps.CASES:
        yield gated_steps.gradient_routing(case)
    yield cached_frames.cached_read()
    yield rendering.frames()
