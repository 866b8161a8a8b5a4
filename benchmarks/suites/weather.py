"""Weather: members of a batch, analyses against forecasts, whole stores, and the convolutions."""

from collections.abc import Iterator

from benchmarks.registry import Comparison
from benchmarks.weather import convolutions, cycles, loading, regridding

TESTS = (
    "tests/weather/test_spherical.py",
    "tests/weather/models/shallow_water/test_model.py",
    "tests/weather/models/held_suarez/test_model.py",
    "tests/weather/models/adas/test_network.py",
    "tests/weather/models/adas/test_analysis.py",
    "tests/weather/test_regrid.py",
    "tests/weather/operations/test_regridding.py",
    "tests/weather/data/cache/test_frames.py",
    "tests/weather/baselines/test_letkf.py",
    "tests/weather/baselines/test_optimal_interpolation.py",
    "tests/core_gates/conv/test_gated.py",
    "tests/core_gates/ops/test_silu_gate.py",
    "tests/core_gates/attention/test_cross.py",
)
THREADS = 1


def comparisons() -> Iterator[Comparison]:
    """Forecasts, analyses, stores and frames, then convolutions; all on one CPU thread."""
    yield cycles.shallow_water()
    yield cycles.held_suarez()
    yield cycles.multiples()
    yield cycles.cycles()
    yield regridding.comparison()
    yield loading.frames()
    yield convolutions.silu_gate()
    yield convolutions.conv_backward()
    for scale in convolutions.SCALES:
        yield convolutions.gated_conv(*scale)
