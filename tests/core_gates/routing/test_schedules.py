import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core_gates import TemperatureSchedule
from core_gates.routing import PiecewiseSchedule, SparsitySchedule

GOLDEN = Path(__file__).parents[2] / "golden" / "moe_inference_sora" / "sora.npz"

POSITIVE = st.floats(0.01, 100)


@pytest.mark.parametrize(
    ("shape", "quarter", "middle"),
    [
        ("linear", 3.25, 2.5),
        ("exponential", 4 * 4**-0.25, 2.0),
        ("cosine", 1 + 1.5 * (1 + math.sqrt(0.5)), 2.5),
        ("cubic", 1 + 3 * 0.75**3, 1.375),
        (
            "logarithmic",
            math.log(0.75 * math.e**4 + 0.25 * math.e),
            math.log((math.e**4 + math.e) / 2),
        ),
    ],
)
def test_closed_forms(shape, quarter, middle):
    schedule = TemperatureSchedule(4.0, 1.0, 8, shape, delay=10)
    assert ([schedule(s) for s in (-1, 0, 10)], schedule(12)) == ([4.0] * 3, pytest.approx(quarter))
    assert schedule(14) == pytest.approx(middle)
    assert [schedule(s) for s in (18, 19, 10**9)] == [1.0] * 3


@given(
    POSITIVE,
    POSITIVE,
    st.integers(0, 50),
    st.integers(0, 20),
    st.sampled_from(["linear", "exponential", "cosine", "cubic", "logarithmic"]),
)
def test_monotone_between_its_ends(start, end, num_steps, delay, shape):
    schedule = TemperatureSchedule(start, end, num_steps, shape, delay)
    values = [schedule(step) for step in range(delay + num_steps + 2)]
    assert (values[0], values[-1]) == (start, end)
    falling = sorted(values, reverse=start > end)
    assert values == pytest.approx(falling)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("linear", "linear"), ("log_linear", "logarithmic"), ("exp_linear", "exponential")],
)
def test_golden_stages_of_a_threshold(name, shape):
    with np.load(GOLDEN) as arrays:
        expected, (start, end, num) = arrays[f"sched_{name}"], arrays[f"sched_{name}_args"]
    schedule = TemperatureSchedule(start, end, int(num) - 1, shape)
    assert [schedule(stage) for stage in range(int(num))] == pytest.approx(expected, rel=1e-12)


def test_the_logarithmic_shape_does_not_overflow():
    up = TemperatureSchedule(0.0, 2000.0, 2, "logarithmic")
    assert up(1) == pytest.approx(2000 - math.log(2))


def test_sparsity_rises_by_a_cubic():
    schedule = SparsitySchedule(1 - 2 / 8, num_steps=12, delay=5)
    assert [schedule(s) for s in (0, 5)] == [0.0, 0.0]
    assert schedule(8) == pytest.approx(0.75 * (1 - 0.75**3))
    assert schedule(11) == pytest.approx(0.75 * (1 - 0.5**3))
    assert [schedule(s) for s in (17, 18, 1000)] == [0.75] * 3
    slow = SparsitySchedule(1 - 2 / 8, num_steps=12, delay=5, every=3)
    assert [slow(s) for s in (8, 9, 10)] == [schedule(8)] * 3
    assert [slow(s) for s in (16, 17)] == [schedule(14), 0.75]


def test_piecewise():
    schedule = PiecewiseSchedule((2, 5), (1.0, 0.5, 0.1))
    assert [schedule(s) for s in range(7)] == [1.0, 1.0, 0.5, 0.5, 0.5, 0.1, 0.1]
    assert PiecewiseSchedule((), (3.0,))(99) == 3.0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TemperatureSchedule(1, 0, -1), "num_steps must not be negative, got -1"),
        (lambda: TemperatureSchedule(1, 0, 1, delay=-2), "delay must not be negative, got -2"),
        (lambda: TemperatureSchedule(1, 0, 1, "square"), "choose one of linear, exponential"),
        (lambda: TemperatureSchedule(1, 0, 1, "exponential"), "positive ends, got 1 and 0"),
        (lambda: SparsitySchedule(1.5, 10), "end is a sparsity between 0 and 1, got 1.5"),
        (
            lambda: SparsitySchedule(0.5, 10, start=-1),
            "start is a sparsity between 0 and 1, got -1",
        ),
        (lambda: SparsitySchedule(0.5, 10, every=0), "every must be at least 1, got 0"),
        (lambda: SparsitySchedule(0.5, -10), "num_steps must not be negative, got -10"),
        (lambda: PiecewiseSchedule((1,), (0.0,)), "1 boundaries need 2 values, got 1"),
        (lambda: PiecewiseSchedule((3, 3), (0.0, 1.0, 2.0)), r"increase strictly, got \(3, 3\)"),
    ],
)
def test_errors(refuses, build, message):
    refuses(ValueError, (message, lambda: build()))
