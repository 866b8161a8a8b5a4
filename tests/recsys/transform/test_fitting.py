"""Fitted scalings of numbers, and targets."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.columns.canonical import RowError
from recsys.metrics import gauc, summed_log_loss, user_resamples
from recsys.schema import Dense, FeatureSchema, Task
from recsys.transform.fitting import Buckets, DenseStatistics, Moments, Scaler, signed_log
from recsys.transform.targets import read_targets, users_of

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


@pytest.mark.parametrize("values", [["b", "a", "b"], [7, 9, 7], [2**40, 3, 2**40]])
def test_users_are_the_same_in_every_table(values):
    table = pl.DataFrame({"u": values})
    found = users_of(table, "u")
    assert found[0] == found[2] != found[1]
    assert (found >= 0).all()
    assert (users_of(table[1:], "u") == found[1:]).all()


def test_without_users_each_row_is_its_own():
    table = pl.DataFrame({"x": [1, 1, 1]})
    assert users_of(table, "", first_row=10).tolist() == [10, 11, 12]
    assert users_of(table, "absent").tolist() == [0, 1, 2]


@pytest.mark.fault("video R1")
def test_each_row_without_a_user_is_its_own():
    table = pl.DataFrame({"u": [3, None, -1]})
    assert users_of(table, "u").tolist() == [3, -2, -3]
    assert users_of(table, "u", first_row=10).tolist() == [3, -12, -13]
    assert users_of(table.with_columns(u=pl.lit("")), "u").tolist() == [-1, -2, -3]
    assert users_of(table.with_columns(u=pl.Series([0.0, np.nan, 0.0])), "u").tolist() == [0, -2, 0]
    assert users_of(table.with_columns(u=pl.lit(None)), "u").dtype == np.int64


@pytest.mark.fault("video R1")
def test_visitors_who_are_not_logged_in_are_no_user_of_many_rows():
    """A score that orders no two rows of a user has GAUC ½; intervals count each visitor."""
    rng = np.random.default_rng(0)
    rate = np.concatenate([np.repeat(rng.random(30), 10), rng.random(150)])
    labels = (rng.random(450) < rate).astype(float)
    known = np.repeat(np.arange(30), 10).tolist()
    users = users_of(pl.DataFrame({"u": [*known, *[None] * 150]}), "u")
    found = gauc(rate, labels, users)
    assert found.weighted == found.mean == 0.5
    assert found.users + found.excluded == 180
    draws = user_resamples(users, resamples=10)
    score = summed_log_loss(labels[:, None], rate[:, None], users)
    assert draws.intervals(score)["log_loss"].units == 180


@pytest.mark.fault("video R15")
@pytest.mark.parametrize(
    ("values", "row"), [([1.0, 2.5, 3.5], 1), (np.array([1, 2, 2**63], np.uint64), 2)]
)
def test_numbers_that_would_be_one_user_are_refused(values, row):
    table = pl.DataFrame({"u": values})
    with pytest.raises(RowError, match=f"row {row}, column 'u': .* is no whole number below 2"):
        users_of(table, "u")
    assert users_of(table[:row], "u").tolist() == list(range(1, row + 1))
    schema = FeatureSchema(tasks=(Task("y"),), user="u")  # scoring asks for no user
    assert len(read_targets(table, schema, labels=False).user) == 3
