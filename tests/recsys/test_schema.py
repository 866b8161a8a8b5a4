"""Schemas of features, vocabularies, scalings and targets."""

from functools import partial

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core_gates.errors import GatesError
from recsys.columns.canonical import RowError
from recsys.data.tables import split_by_time
from recsys.infer import infer_schema
from recsys.schema import Crossed, Dense, FeatureSchema, History, Sparse, Task
from recsys.transform import FeatureTransform
from recsys.transform.fitting import Buckets, DenseStatistics, Moments, Scaler, signed_log
from recsys.transform.targets import read_targets, users_of
from recsys.vocabulary import HashedValues, Vocabulary

TASKS = (Task("y"),)


def test_names_and_categories_are_tasks():
    told = {"click": "look", "buy": "act"}
    tasks = (Task("click", category="look"), Task("buy", category="act"))
    assert FeatureSchema(tasks=told).tasks == tasks == FeatureSchema(tasks=tasks).tasks
    assert FeatureSchema(tasks=("y",)).tasks == TASKS


@pytest.mark.fault("video R12")
@pytest.mark.parametrize("kind", [Sparse, Dense])
def test_a_feature_called_like_the_indicator_of_another_is_refused(kind):
    """Both would be one input of the network."""
    others = {"sparse": (Sparse("i"),), "dense": (Dense("age"),)}
    name = "sparse" if kind is Sparse else "dense"
    others[name] = (*others[name], kind("age missing"))
    words = "the feature 'age missing' is called like the indicator that 'age' is missing: rename"
    with pytest.raises(ValueError, match=words):
        FeatureSchema(tasks=TASKS, **others)
    bucketed = Dense("age", scaling="buckets")  # has no indicator
    FeatureSchema(tasks=TASKS, sparse=(Sparse("age missing"),), dense=(bucketed,))
    FeatureSchema(tasks=(Task("age missing"),), dense=(Dense("age"),))


@pytest.mark.fault("video R12")
def test_a_draft_tells_of_such_a_column_in_one_line():
    rng = np.random.default_rng(0)
    table = pl.DataFrame(
        {
            "age": rng.normal(size=400),
            "age missing": rng.integers(0, 2, 400),
            "y": rng.integers(0, 2, 400),
        }
    )
    with pytest.raises(GatesError, match="'age missing' is called like the indicator"):
        infer_schema(table, ["y"])
    assert infer_schema(table, ["y"], drop=["age missing"]).schema.dense[0].name == "age"


@pytest.mark.fault("video R15")
@pytest.mark.parametrize(
    "feature",
    [partial(Sparse, "a"), partial(Dense, "a"), partial(History, "a", "b"), partial(Crossed, "ab")],
)
def test_each_feature_is_of_a_known_side(feature):
    assert feature(side="item").side == "item"
    with pytest.raises(ValueError, match="side is 'users'; choose one of user, item, context"):
        feature(side="users")


@pytest.mark.fault("video R15")
@pytest.mark.parametrize(
    "times",
    [[[1], [2]], np.ones((2, 2)), [{"a": 1}, {"a": 2}], [[None], [[1]]]],
    ids=["lists", "arrays", "structs", "lists of lists"],
)
def test_times_without_an_order_are_refused_in_one_line(times):
    schema = FeatureSchema(tasks=TASKS, sparse=(Sparse("i"),), time="t")
    table = pl.DataFrame({"i": [1, 2], "t": times, "y": [0, 1]})
    for call in (FeatureTransform(schema).fit, lambda t: split_by_time(t, "t", validation=0.3)):
        with pytest.raises(GatesError, match=r"^column 't' has type .*, a time must be .*$"):
            call(table)


WORDS = st.lists(st.one_of(st.none(), st.sampled_from(["a", "b", "", "ä", "7", "long" * 9])))
NUMBERS = st.lists(st.one_of(st.none(), st.integers(-2, 9), st.just(2**40)))


def column(values):
    return pl.Series("c", values, dtype=pl.String if _texts(values) else pl.Int64)


def _texts(values):
    return any(isinstance(value, str) for value in values)


def by_hand(values, min_count):
    """Values and their rows, counted one by one."""
    known = [v for v in values if v not in (None, "") and (isinstance(v, str) or v >= 0)]
    counts = {value: known.count(value) for value in known}
    kept = [value for value in counts if counts[value] >= min_count]
    ordered = sorted(sorted(kept), key=lambda value: -counts[value])
    return {value: row for row, value in enumerate(ordered, 2)}, counts


@given(st.one_of(WORDS, NUMBERS), st.integers(1, 3))
def test_rows_follow_falling_frequency(values, min_count):
    rows, counts = by_hand(values, min_count)
    made = Vocabulary.fit(column(values), min_count)
    assert made.values.to_list() == list(rows)
    assert (made.counts.tolist(), len(made)) == ([counts[value] for value in rows], 2 + len(rows))
    expected = [1 if v in (None, "") or (v not in counts) else rows.get(v, 0) for v in values]
    assert made.lookup(column(values)).tolist() == expected


def test_unknown_and_missing():
    made = Vocabulary.fit(pl.Series(["x", "y", "y"]))
    assert made.lookup(pl.Series(["y", "x", "z", "", None])).tolist() == [2, 3, 0, 1, 1]
    made = Vocabulary.fit(pl.Series([5, 5, 8]))
    assert made.lookup(pl.Series([8.0, 5.0, 6.0, float("nan"), -124.0])).tolist() == [3, 2, 0, 1, 1]


@pytest.mark.parametrize("dtype", [pl.Int8, pl.UInt64, pl.Float32, pl.String, pl.Categorical])
@pytest.mark.parametrize("kind", [pl.Int64, pl.String])
def test_the_type_of_a_column_changes_nothing(kind, dtype):
    made = Vocabulary.fit(pl.Series([7, 9, 9, 100]).cast(kind))
    text = pl.Series(["7", "100", "9", "3", None])
    sought = text if dtype in (pl.String, pl.Categorical) else text.cast(pl.Int64)
    last = 4 if kind == pl.Int64 else 3  # ties are ordered as numbers or as text
    assert made.lookup(sought.cast(dtype)).tolist() == [7 - last, last, 2, 0, 1]


def test_all_missing_makes_an_empty_vocabulary():
    made = Vocabulary.fit(pl.Series("c", [None, None]))
    assert (len(made), made.lookup(pl.Series([None, 3])).tolist()) == (2, [1, 0])


@given(st.lists(st.integers(0, 20)), st.lists(st.integers(-1, 40)), st.integers(1, 3))
def test_growth_leaves_old_rows(old, new, min_count):
    before = Vocabulary.fit(pl.Series(old, dtype=pl.Int64))
    after = before.grow(pl.Series(new, dtype=pl.Int64), min_count)
    everything = pl.Series(range(41))
    rows, grown = before.lookup(everything), after.lookup(everything)
    assert (grown[rows > 0] == rows[rows > 0]).all()
    added = {v for v in new if v >= 0 and v not in old and new.count(v) >= min_count}
    assert set(np.flatnonzero((rows == 0) & (grown > 0)).tolist()) == added
    assert sorted(grown[grown > 0].tolist()) == list(range(2, len(after)))
    assert len(before) == 2 + len(set(old))
    for value in old:
        assert after.counts[grown[value] - 2] == old.count(value) + new.count(value)


def test_growth_appends_by_frequency():
    after = Vocabulary.fit(pl.Series(["b", "a"])).grow(pl.Series(["z", "y", "z", "x", "a"]))
    assert after.values.to_list() == ["a", "b", "z", "x", "y"]


@pytest.mark.parametrize("values", [["b", "ä", "ä"], [5, 3, 3], [None]])
def test_saved_and_loaded(values, tmp_path):
    made = Vocabulary.fit(pl.Series("c", values))
    one, other = made.save(tmp_path / "a.parquet"), made.save(tmp_path / "b.parquet")
    assert one.read_bytes() == other.read_bytes()
    loaded = Vocabulary.load(one)
    assert (loaded.values.to_list(), loaded.kind) == (made.values.to_list(), made.kind)
    assert (loaded.counts == made.counts).all()
    assert (loaded.lookup(pl.Series(values)) == made.lookup(pl.Series(values))).all()


@pytest.mark.parametrize("content", [None, b"PAR1 and nothing", b""])
def test_a_broken_file_is_refused(content, tmp_path):
    path = tmp_path / "v.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(GatesError, match=r"v\.parquet is no vocabulary"):
        Vocabulary.load(path)


def test_a_file_with_a_value_twice_is_refused(tmp_path):
    pl.DataFrame({"value": [1, 1], "count": [2, 2]}).write_parquet(tmp_path / "v.parquet")
    with pytest.raises(GatesError, match="twice"):
        Vocabulary.load(tmp_path / "v.parquet")


def test_fractions_are_refused_by_row():
    with pytest.raises(RowError, match=r"row 2, column 'price': 2\.5 is no whole number"):
        Vocabulary.fit(pl.Series("price", [1.0, float("nan"), 2.5]))


def test_hashed_values():
    hashed = HashedValues("integer", 100)
    rows = hashed.lookup(pl.Series([1, 2, 2, None, -5]))
    assert rows[1] == rows[2] > 1
    assert rows[3:].tolist() == [1, 1]
    assert (hashed.lookup(pl.Series(["1", "2", "x"])) == [rows[0], rows[1], 0]).all()
    assert set(hashed.lookup(pl.Series(range(10_000))).tolist()) == set(range(2, len(hashed)))
    texts = HashedValues("string", 100)
    assert (texts.lookup(pl.Series([1, 2])) == texts.lookup(pl.Series(["1", "2"]))).all()


FITTED = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50)


@given(FITTED, st.integers(1, 7))
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


@given(FITTED)
def test_the_signed_logarithm_is_odd_and_monotone(numbers):
    values = np.sort(numbers)
    found = signed_log(values)
    assert (np.diff(found) >= 0).all()
    assert np.array_equal(signed_log(-values), -found)
    assert np.expm1(np.abs(found)) == pytest.approx(np.abs(values), rel=1e-9, abs=1e-9)


@given(FITTED)
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


@given(FITTED, st.integers(2, 8))
def test_buckets_are_quantiles(numbers, count):
    statistics = DenseStatistics(Dense("x", "buckets", count))
    statistics.add(np.array(numbers))
    buckets = statistics.finish()
    assert isinstance(buckets, Buckets)
    rows = buckets.rows(np.sort(numbers))
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
