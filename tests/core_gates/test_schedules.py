import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core_gates import PiecewiseSchedule, TemperatureSchedule

POSITIVE = st.floats(0.01, 100)


@pytest.mark.parametrize(
    ("shape", "quarter", "middle"),
    [
        ("linear", 3.25, 2.5),
        ("exponential", 4 * 4**-0.25, 2.0),
        ("cosine", 1 + 1.5 * (1 + math.sqrt(0.5)), 2.5),
    ],
)
def test_closed_forms(shape, quarter, middle):
    schedule = TemperatureSchedule(4.0, 1.0, 8, shape, delay=10)
    assert [schedule(s) for s in (-1, 0, 10)] == [4.0] * 3
    assert schedule(12) == pytest.approx(quarter)
    assert schedule(14) == pytest.approx(middle)
    assert [schedule(s) for s in (18, 19, 10**9)] == [1.0] * 3


@given(
    POSITIVE,
    POSITIVE,
    st.integers(0, 50),
    st.integers(0, 20),
    st.sampled_from(["linear", "exponential", "cosine"]),
)
def test_monotone_between_its_ends(start, end, num_steps, delay, shape):
    schedule = TemperatureSchedule(start, end, num_steps, shape, delay)
    values = [schedule(step) for step in range(delay + num_steps + 2)]
    assert (values[0], values[-1]) == (start, end)
    falling = sorted(values, reverse=start > end)
    assert values == pytest.approx(falling)


def test_schedules_are_pure_and_comparable():
    schedule = TemperatureSchedule(2.0, 0.3, 100, "exponential")
    backwards = [schedule(step) for step in reversed(range(100))]
    assert backwards[::-1] == [schedule(step) for step in range(100)]
    assert schedule == TemperatureSchedule(2.0, 0.3, 100, "exponential")


def test_piecewise():
    schedule = PiecewiseSchedule((2, 5), (1.0, 0.5, 0.1))
    assert [schedule(s) for s in range(7)] == [1.0, 1.0, 0.5, 0.5, 0.5, 0.1, 0.1]
    assert PiecewiseSchedule((), (3.0,))(99) == 3.0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TemperatureSchedule(1, 0, -1), "must not be negative, got -1 and 0"),
        (lambda: TemperatureSchedule(1, 0, 1, delay=-2), "must not be negative, got 1 and -2"),
        (lambda: TemperatureSchedule(1, 0, 1, "square"), "choose one of linear, exponential"),
        (lambda: TemperatureSchedule(1, 0, 1, "exponential"), "positive ends, got 1 and 0"),
        (lambda: PiecewiseSchedule((1,), (0.0,)), "1 boundaries need 2 values, got 1"),
        (lambda: PiecewiseSchedule((3, 3), (0.0, 1.0, 2.0)), r"rise strictly, got \(3, 3\)"),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()
