import math

import pytest

from core_gates.errors import GatesError
from recsys.metrics import gains_over_single


def test_mean_relative_gain_and_seesaw():
    single = {"a": 0.6, "b": 0.75, "c": 0.8}
    found = gains_over_single({"a": 0.65, "b": 0.7, "c": 0.8}, single)
    assert found == (pytest.approx((0.5 - 0.2 + 0) / 3), 1, 3, 0)
    assert gains_over_single(single, single) == (0, 0, 3, 0)


def test_a_margin_forgives_small_losses():
    assert gains_over_single({"a": 0.5995}, {"a": 0.6}).worse == 1
    assert gains_over_single({"a": 0.5995}, {"a": 0.6}, margin=0.001).worse == 0


def test_tasks_without_a_comparison_are_left_out():
    found = gains_over_single(
        {"a": math.nan, "b": 0.6, "c": 0.6, "d": 0.7}, {"a": 0.6, "b": 0.5, "c": math.nan, "d": 0.6}
    )
    assert found == (pytest.approx(1), 0, 1, 3)
    assert math.isnan(gains_over_single({}, {}).mean)
    with pytest.raises(GatesError, match="tasks differ: a and, alone, b; expected the same"):
        gains_over_single({"a": 0.6}, {"b": 0.6})
