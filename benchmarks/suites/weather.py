"""Weather: what a member of a batch costs, analyses against forecasts, and the convolutions."""

from collections.abc import Iterator

from benchmarks.registry import Comparison
from benchmarks.weather import analyses, convolutions, forecasts

TESTS = (
    "tests/weather/test_spherical.py",
    "tests/weather/test_shallow_water.py",
    "tests/weather/test_held_suarez.py",
    "tests/weather/test_adas.py",
    "tests/weather/test_analysis.py",
    "tests/weather/baselines/test_letkf.py",
    "tests/weather/baselines/test_optimal_interpolation.py",
    "tests/core_gates/test_conv.py",
    "tests/core_gates/test_silu_gate.py",
    "tests/core_gates/test_cross.py",
)
THREADS = 1


def comparisons() -> Iterator[Comparison]:
    """Forecasts, analyses, then convolutions; all on one CPU thread."""
    yield forecasts.shallow_water()
    yield forecasts.held_suarez()
    yield analyses.multiples()
    yield analyses.cycles()
    yield convolutions.silu_gate()
    yield convolutions.conv_backward()
    for scale in convolutions.SCALES:
        yield convolutions.gated_conv(*scale)
