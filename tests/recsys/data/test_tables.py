"""Tables: their splits, digests and leaks."""

import datetime
import math
from itertools import chain, pairwise

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from core_gates.errors import GatesError
from harness.evidence import Row
from recsys.data.doubts import of_hierarchy, of_loss, of_rows
from recsys.data.leaks import chance_error, find_leaks, permute_labels, repeated_rows
from recsys.data.tables import (
    RankingTables,
    rolling_windows,
    split_at,
    split_by_hash,
    split_by_time,
    table_digest,
)
from recsys.schema import Dense, FeatureSchema, Sparse, Task

TIMES = st.lists(st.integers(-50, 50), min_size=1, max_size=60)


def with_times(times):
    return pl.DataFrame({"t": times, "row": range(len(times))})


def rows_of(split):
    return sorted(chain(*(part["row"] for part in split)))


@given(TIMES, st.floats(0, 0.4), st.floats(0, 0.4))
def test_time_is_never_crossed(times, validation, test):
    split = split_by_time(with_times(times), "t", validation=validation, test=test)
    assert rows_of(split) == list(range(len(times)))
    for one, later in pairwise([part["t"] for part in split if len(part)]):
        assert one.max() < later.min()
    for part in split:
        assert part["row"].is_sorted()


def test_fractions_of_distinct_times():
    times = np.random.default_rng(0).permutation(1000)
    split = split_by_time(with_times(times), "t", validation=0.2, test=0.1)
    assert ([len(part) for part in split], split.test["t"].min()) == ([700, 200, 100], 900)


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


TABLE = pl.DataFrame(
    {
        "a": [1, None, 0],
        "b": ["", None, "x"],
        "c": [0.0, None, float("nan")],
        "d": [[1], None, []],
        "e": [True, False, None],
        "f": [datetime.date(2022, 4, 8), None, None],
    }
)

CHANGES = {
    "null for 0": TABLE.with_columns(a=pl.Series([1, None, None])),
    "order": TABLE[::-1],
    "names": TABLE.rename({"a": "z"}),
    "type": TABLE.with_columns(pl.col("a").cast(pl.Int32)),
    "null for empty text": TABLE.with_columns(b=pl.Series([None, None, "x"])),
    "null for NaN": TABLE.with_columns(c=pl.Series([0.0, None, None])),
    "null for an empty list": TABLE.with_columns(d=pl.Series([[1], None, None])),
    "a list cut elsewhere": TABLE.with_columns(d=pl.Series([[], None, [1]])),
    "a date": TABLE.with_columns(f=pl.lit(datetime.date(2022, 4, 9))),
    "a boolean": TABLE.with_columns(e=pl.Series([True, True, None])),
    "columns swapped": TABLE.select("b", "a", "c", "d", "e", "f"),
    "no rows": TABLE[:0],
}


@pytest.mark.fault("video V18")
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([[1, None, 2], [3]], [[1, 2, None], [3]]),
        ([[None], []], [[], [None]]),
        ([["a", None], ["b"]], [["a"], [None, "b"]]),
    ],
)
def test_nulls_in_lists_have_places(one, other):
    tables = [pl.DataFrame({"a": pl.Series(rows)}) for rows in (one, other)]
    assert table_digest(tables[0]) != table_digest(tables[1])


@pytest.mark.fault("video V18")
def test_integers_beyond_63_bits_are_told_apart_and_smaller_ones_stay():
    def digest(*values):
        return table_digest(pl.DataFrame({"a": pl.Series(values, dtype=pl.UInt64)}))

    assert len({digest(value) for value in (0, 2**63, 2**63 + 5, 2**64 - 1, None)}) == 5
    assert digest(7, 2**62, None, 2**63 - 1)[:16] == "a19cf32d932ab501"


def test_digests_of_lists_without_nulls_stay():
    table = pl.DataFrame({"a": [[1, 2], None, [], [3]], "b": [["x"], [], None, ["", "y"]]})
    assert table_digest(table)[:16] == "341be2777d44b423"


@pytest.mark.parametrize("case", CHANGES)
def test_every_change_is_seen(case):
    assert table_digest(CHANGES[case]) != table_digest(TABLE)


def test_it_never_changes():
    assert table_digest(TABLE) == table_digest(TABLE.clone())
    assert table_digest(TABLE)[:16] == "ce575dbb13fed796"


N = 4000


def table(draw, n=N):
    y = (draw.random(n) < 0.3).astype(int)
    return pl.DataFrame(
        {
            "x": draw.normal(size=n),
            "leak": y + 0.01 * draw.normal(size=n),
            "shop": np.where(y, "a", "b"),
            "u": draw.integers(0, 50, n),
            "y": y,
            "z": (draw.random(n) < 0.5).astype(int),
        }
    )


SCHEMA = FeatureSchema(
    tasks=(Task("y"), Task("z")),
    sparse=(Sparse("u"), Sparse("shop")),
    dense=(Dense("x"), Dense("leak")),
)


def test_leaks_are_named():
    found = find_leaks(table(np.random.default_rng(6)), SCHEMA)
    assert {(leak.column, leak.task) for leak in found} == {("leak", "y"), ("shop", "y")}
    assert found[0].auc == pytest.approx(1.0)
    assert any(str(leak).startswith("column 'leak' alone predicts 'y'") for leak in found)


def test_permuted_labels_are_predicted_by_nothing():
    before = table(np.random.default_rng(7))
    after = permute_labels(before, SCHEMA, seed=3)
    assert after.drop("y", "z").equals(before.drop("y", "z"))
    assert after["y"].sum() == before["y"].sum()
    pairs = [t.group_by("y", "z").len().sort("y", "z") for t in (before, after)]
    assert pairs[0].equals(pairs[1])
    assert find_leaks(after, SCHEMA) == []
    positives = int(after["y"].sum())
    error = chance_error(positives, N - positives)
    assert abs(roc_auc_score(after["y"], after["leak"]) - 0.5) < 3 * error
    assert roc_auc_score(before["y"], before["leak"]) - 0.5 > 30 * error


def test_columns_that_follow_the_label_are_permuted_with_it():
    before = table(np.random.default_rng(8))
    after = permute_labels(before, SCHEMA, also=["leak"])
    assert np.corrcoef(after["leak"], after["y"])[0, 1] > 0.99
    assert abs(np.corrcoef(after["leak"], before["leak"])[0, 1]) < 0.1


def test_the_error_of_chance_is_that_of_random_scores():
    draw = np.random.default_rng(9)
    labels = np.repeat([1, 0], [40, 160])
    areas = [roc_auc_score(labels, draw.random(200)) for _ in range(400)]
    assert np.std(areas) == pytest.approx(chance_error(40, 160), rel=0.12)
    assert np.isnan(chance_error(0, 10))


def test_repeated_rows(refuses):
    train = pl.DataFrame({"u": [1, 1, 2, None], "v": [1, 2, 1, 1], "t": [5, 5, 5, 5]})
    test = pl.DataFrame({"u": [1, 2, 2], "v": [1, 1, 1], "t": [5, 5, 6]})
    assert repeated_rows(train, test, ["u", "v", "t"]) == 2
    assert repeated_rows(train, test, ["u", "v"]) == 3
    refuses(
        GatesError,
        ("lacks the column 'w'", lambda: repeated_rows(train, test, ["u", "w"])),
        ("no columns are named", lambda: repeated_rows(train, test, [])),
    )


def test_what_is_doubtful_about_rows_is_told():
    rows = pl.DataFrame({"u": [7, None, -1, 8], "x": [1, 2, 3, 4], "a": [0, 0, 0, 0]})
    rows = rows.with_columns(b=pl.Series([0, 1, 1, 1]), m=pl.Series([0, 1, 1, 1]))
    tasks = (Task("a"), Task("b"), Task("c", label="b", mask="m"))
    schema = FeatureSchema(tasks, sparse=(Sparse("x"),), user="u")
    few, constant, masked, users = of_rows(RankingTables("t", schema, rows, rows, rows))
    assert few.startswith("4 training rows are few: what fewer than 1,000")
    assert constant.startswith("the label 'a' is 0 in all training rows: nothing can be learned")
    assert masked.startswith("the label 'b' is 1 in all training rows")
    assert users.startswith("50% of the training rows have no 'u'")
    many = pl.concat([rows[[0, 3]].with_columns(a=pl.Series([0, 1]))] * 500)
    better = FeatureSchema(tasks[:2], sparse=(Sparse("x"),), user="u")
    assert of_rows(RankingTables("t", better, many, rows, rows)) == ()
    (line,) = of_hierarchy(["MMoE", "HoME"], schema)
    assert "as labels {a: CATEGORY, b: CATEGORY} do" in line
    gap = Row("home", "test", "summed log_loss", -0.1, -0.15, -0.05)
    assert of_hierarchy(["MMoE"], schema) == of_loss("home", 1.0, gap) == ()
    line = "home is not shown to beat base rates, 1.2000 against 1.3000, difference "
    assert of_loss("home", 1.2, gap._replace(high=0.01))[0].startswith(line)
    assert of_loss("home", 1.2, gap._replace(low=math.nan, high=math.nan)) == ()  # of one user
