import datetime
from itertools import chain, pairwise

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core_gates.errors import GatesError
from recsys.data.tables import rolling_windows, split_at, split_by_hash, split_by_time

TIMES = st.lists(st.integers(-50, 50), min_size=1, max_size=60)


def with_times(times):
    return pl.DataFrame({"t": times, "row": range(len(times))})


def rows_of(split):
    return sorted(chain(*(part["row"] for part in split)))


@given(TIMES, st.floats(0, 0.4), st.floats(0, 0.4))
def test_time_is_never_crossed(times, validation, test):
    split = split_by_time(with_times(times), "t", validation=validation, test=test)
    assert rows_of(split) == list(range(len(times)))
    parts = [part["t"] for part in split if len(part)]
    for one, later in pairwise(parts):
        assert one.max() < later.min()
    for part in split:
        assert part["row"].is_sorted()


def test_fractions_of_distinct_times():
    times = np.random.default_rng(0).permutation(1000)
    split = split_by_time(with_times(times), "t", validation=0.2, test=0.1)
    assert [len(part) for part in split] == [700, 200, 100]
    assert split.test["t"].min() == 900


def test_no_test_part():
    split = split_by_time(with_times([3, 1, 2, 5]), "t", validation=0.5, test=0.0)
    assert [part["t"].to_list() for part in split] == [[1, 2], [3, 5], []]


def test_dates():
    days = [datetime.date(2022, 4, day) for day in (3, 1, 2, 3)]
    split = split_at(
        with_times(days),
        "t",
        validation_from=datetime.date(2022, 4, 2),
        test_from=datetime.date(2022, 4, 3),
    )
    assert [part["row"].to_list() for part in split] == [[1], [2], [0, 3]]


@pytest.mark.parametrize(
    "times",
    [["2024-01-31", "2023-12-01", "2024-02-01"], ["20240131", "20231201", "20240201"],
     ["2024-01-31 08:00", "2023-12-01T23:59:59+00:00", "2024-02-01"]],
)  # fmt: skip
def test_text_that_sorts_by_time(times):
    split = split_by_time(with_times(times), "t", validation=0.3, test=0.3)
    assert [part["row"].to_list() for part in split] == [[1], [0], [2]]


@given(st.lists(st.integers(0, 20), min_size=1, max_size=80), st.integers(0, 3))
def test_users_stay_together(users, seed):
    table = pl.DataFrame({"u": users, "row": range(len(users))})
    split = split_by_hash(table, "u", validation=0.3, test=0.3, seed=seed)
    assert rows_of(split) == list(range(len(users)))
    kept = [set(part["u"]) for part in split]
    assert not kept[0] & kept[1] | kept[1] & kept[2] | kept[0] & kept[2]
    alone = split_by_hash(table[:1], "u", validation=0.3, test=0.3, seed=seed)
    assert [len(part) > 0 for part in alone] == [users[0] in part for part in kept]


@pytest.mark.parametrize("columns", [(), "u", ("u", "v")], ids=str)
def test_parts_have_their_fractions(columns):
    table = pl.DataFrame({"u": range(20_000), "v": ["x"] * 20_000})
    split = split_by_hash(table, columns, validation=0.2, test=0.1, seed=1)
    assert [len(part) / 20_000 for part in split] == pytest.approx([0.7, 0.2, 0.1], abs=0.01)
    other = split_by_hash(table, columns, validation=0.2, test=0.1, seed=2)
    both = set(split.test["u"]) & set(other.test["u"])
    assert len(both) / 20_000 == pytest.approx(0.01, abs=0.004)


def test_the_type_of_users_changes_nothing():
    table = pl.DataFrame({"u": range(100)})
    one = split_by_hash(table, "u", test=0.3)
    other = split_by_hash(table.cast(pl.Float64), "u", test=0.3)
    assert one.test["u"].to_list() == other.test["u"].cast(pl.Int64).to_list()


@pytest.mark.fault("video R1")
@pytest.mark.parametrize("columns", ["u", ("v", "u")], ids=str)
@pytest.mark.parametrize("missing", [None, -1, float("nan"), ""], ids=repr)
def test_rows_without_a_user_are_split_one_by_one(columns, missing):
    known = ["x" if missing == "" else 1.0 if missing != missing else 1] * 300
    table = pl.DataFrame({"u": [*known, *[missing] * 9_700], "v": ["x"] * 10_000})
    split = split_by_hash(table, columns, validation=0.2, test=0.1)
    of_known = [int((part["u"] == known[0]).sum()) for part in split]
    assert sorted(of_known) == [0, 0, 300]
    others = [len(part) - count for part, count in zip(split, of_known, strict=True)]
    assert [count / 9_700 for count in others] == pytest.approx([0.7, 0.2, 0.1], abs=0.02)
    again = split_by_hash(table, columns, validation=0.2, test=0.1)
    assert all(a.equals(b) for a, b in zip(split, again, strict=True))


def test_rolling_windows():
    days = [20220408 + k // 3 for k in range(30)]
    windows = list(rolling_windows(with_times(days), "t", test=2, validation=1, windows=3))
    assert [sorted(set(w.test["t"])) for w in windows] == [
        [20220412, 20220413], [20220414, 20220415], [20220416, 20220417],
    ]  # fmt: skip
    assert [sorted(set(w.validation["t"])) for w in windows] == [[20220411], [20220413], [20220415]]
    for window in windows:
        assert window.train["t"].max() < window.validation["t"].min()
        assert window.train["t"].min() == 20220408


FAULTS = {
    "no column": (lambda t: split_by_time(t, "x"), "the table has no column 'x'"),
    "no column to hash": (lambda t: split_by_hash(t, "x"), "the table has no column 'x'"),
    "all is tested": (lambda t: split_by_time(t, "t", test=1.0), "leave no rows to train on"),
    "negative": (lambda t: split_by_hash(t, test=-0.1), "leave no rows to train on"),
    "fractions as users": (
        lambda t: split_by_hash(t.with_columns(u=pl.Series([1.0, 2.5, 3.5])), "u"),
        "row 1, column 'u': 2.5 is no whole number",
    ),
    "not ascending": (
        lambda t: split_at(t, "t", validation_from=3, test_from=2),
        "validation begins at 3, after the test part at 2",
    ),
    "a missing time": (
        lambda t: split_by_time(t.with_columns(t=pl.Series([1, None, 3])), "t"),
        "row 1, column 't': it has no time",
    ),
    "NaN": (
        lambda t: split_by_time(t.with_columns(t=pl.Series([1.0, 2.0, float("nan")])), "t"),
        "row 2, column 't': it has no time",
    ),
    "a word among numbers": (
        lambda t: split_by_time(t.with_columns(t=pl.Series(["9", "10", "soon"])), "t"),
        "row 2, column 't': it is 'soon': expected numbers, or dates like 2024-01-31",
    ),
    "numbers as text, 10 before 9": (
        lambda t: split_by_time(t.with_columns(t=pl.Series(["9", "10", "11"])), "t"),
        "row 1, column 't': it is '10': expected numbers",
    ),
    "dates by month": (
        lambda t: split_by_time(t.with_columns(t=pl.Series(["2024-01-31", "2/1/24", "x"])), "t"),
        "row 1, column 't': it is '2/1/24': expected",
    ),
    "hours of one digit": (
        lambda t: split_by_time(t.with_columns(t=pl.Series(["2024-01-31 8:00"] * 3)), "t"),
        "row 0, column 't': it is '2024-01-31 8:00'",
    ),
    "no rows": (lambda t: split_by_time(t[:0], "t"), "the table has no rows"),
    "few periods": (
        lambda t: list(rolling_windows(t, "t", test=2, windows=2)),
        "column 't' has 3 periods; 2 windows of 2 after 1 of validation and one of training need 6",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults(case):
    call, words = FAULTS[case]
    with pytest.raises(GatesError, match=words):
        call(with_times([1, 2, 3]))
