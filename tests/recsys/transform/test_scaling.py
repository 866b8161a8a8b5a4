import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.schema import Dense
from recsys.transform.fitting import Buckets, DenseStatistics, Moments, Scaler, signed_log

NUMBERS = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50)


@given(NUMBERS, st.integers(1, 7))
def test_moments_of_parts_are_those_of_the_whole(numbers, parts):
    moments = Moments()
    for part in np.array_split(np.array(numbers), parts):
        moments.add(part)
    assert moments.mean == pytest.approx(np.mean(numbers), rel=1e-9, abs=1e-9)
    if min(numbers) == max(numbers):
        assert moments.deviation == 0.0
    else:
        assert moments.deviation == pytest.approx(np.std(numbers), rel=1e-6, abs=1e-9)


def test_a_large_offset_does_not_blur_the_deviation():
    moments = Moments()
    for start in range(0, 1000, 10):
        moments.add(1.65e12 + np.arange(start, start + 10.0))
    assert moments.deviation == pytest.approx(np.std(np.arange(1000.0)), rel=1e-9)


@given(NUMBERS)
def test_the_signed_logarithm_is_odd_and_monotone(numbers):
    values = np.sort(numbers)
    found = signed_log(values)
    assert (np.diff(found) >= 0).all()
    assert np.array_equal(signed_log(-values), -found)
    assert np.expm1(np.abs(found)) == pytest.approx(np.abs(values), rel=1e-9, abs=1e-9)


@given(NUMBERS)
def test_training_rows_get_mean_0_and_variance_1(numbers):
    statistics = DenseStatistics(Dense("x", "standardize"))
    statistics.add(np.array([*numbers, np.nan]))
    out = np.empty(len(numbers), np.float32)
    scaler = statistics.finish()
    assert isinstance(scaler, Scaler)
    assert not scaler.scale(np.array(numbers), out).any()
    assert abs(out.mean()) < 1e-3
    assert out.std() == pytest.approx(1.0, abs=1e-3) or max(numbers) - min(numbers) < 1e-6


def test_huge_numbers_stay_finite():
    out = np.empty(2, np.float32)
    Scaler(0.0, 1e10, logarithmic=False).scale(np.array([1e308, -1e308]), out)
    assert np.isfinite(out).all()
    assert np.isfinite(out.astype(np.float32) ** 2).all()


@given(NUMBERS, st.integers(2, 8))
def test_buckets_are_quantiles(numbers, count):
    statistics = DenseStatistics(Dense("x", "buckets", count))
    statistics.add(np.array(numbers))
    buckets = statistics.finish()
    assert isinstance(buckets, Buckets)
    values = np.sort(numbers)
    rows = buckets.rows(values)
    assert (np.diff(rows) >= 0).all()
    assert rows.min() >= 2
    assert rows.max() < buckets.num_rows
    if len(set(numbers)) == len(numbers) >= 2 * count:
        assert np.ptp(np.bincount(rows - 2)) <= 2
    assert buckets.rows(np.array([np.nan, -1e9, 1e9])).tolist() == [1, 2, rows.max()]
