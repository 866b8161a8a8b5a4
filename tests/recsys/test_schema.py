"""Schemas of features, and vocabularies."""

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
from recsys.vocabulary import HashedValues, Vocabulary

TASKS = (Task("y"),)


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
    calls = (FeatureTransform(schema).fit, lambda t: split_by_time(t, "t", validation=0.3))
    for call in calls:
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
    assert made.counts.tolist() == [counts[value] for value in rows]
    assert len(made) == 2 + len(rows)
    expected = [1 if v in (None, "") or (v not in counts) else rows.get(v, 0) for v in values]
    assert made.lookup(column(values)).tolist() == expected


def test_unknown_and_missing():
    made = Vocabulary.fit(pl.Series(["x", "y", "y"]))
    assert made.lookup(pl.Series(["y", "x", "z", "", None])).tolist() == [2, 3, 0, 1, 1]
    made = Vocabulary.fit(pl.Series([5, 5, 8]))
    sought = pl.Series([8.0, 5.0, 6.0, float("nan"), -124.0])
    assert made.lookup(sought).tolist() == [3, 2, 0, 1, 1]


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
    assert len(made) == 2
    assert made.lookup(pl.Series([None, 3])).tolist() == [1, 0]


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
    assert loaded.values.to_list() == made.values.to_list()
    assert loaded.kind == made.kind
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
    many = hashed.lookup(pl.Series(range(10_000)))
    assert set(many.tolist()) == set(range(2, len(hashed)))
    texts = HashedValues("string", 100)
    assert (texts.lookup(pl.Series([1, 2])) == texts.lookup(pl.Series(["1", "2"]))).all()
