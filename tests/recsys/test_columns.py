"""Columns as canonical values, hashes, quantiles, and how well each sorts alone."""

import datetime
import pickle

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from core_gates.errors import GatesError
from recsys.columns.canonical import MISSING, UNREADABLE, RowError, canonical, kind_of, numbers_of
from recsys.columns.column_auc import column_aucs
from recsys.columns.hashing import (
    QuantileSketch,
    RowIndex,
    bucket,
    combine,
    hash_integers,
    hash_strings,
    mix,
)

NAN = float("nan")
SEVEN = {
    "integers": pl.Series([7, None]),
    "floats": pl.Series([7.0, NAN]),
    "infinite": pl.Series([7.0, float("-inf")]),
    "strings": pl.Series([" 7", ""]),
    "exponents": pl.Series(["0.7e1", None]),
    "categories": pl.Series(["7.0", None], dtype=pl.Categorical),
    "decimals": pl.Series(["7", None]).cast(pl.Decimal(10, 2)),
}


@pytest.mark.parametrize("case", SEVEN)
def test_one_number_however_it_is_written(case):
    assert np.array_equal(numbers_of(SEVEN[case]), [7.0, NAN], equal_nan=True)


def test_nothing_and_booleans():
    assert np.isnan(numbers_of(pl.Series([None, None]))).all()
    assert numbers_of(pl.Series([True, False])).tolist() == [1.0, 0.0]


def test_text_is_refused_by_column_and_row():
    with pytest.raises(RowError, match="row 2, column 'price': 'cheap' is no number") as caught:
        numbers_of(pl.Series("price", ["1", "", "cheap", "dear"]))
    assert (caught.value.column, caught.value.row) == ("price", 2)
    assert "row 12" in str(caught.value.shifted(10))


def test_the_error_reaches_another_process():
    error = pickle.loads(pickle.dumps(RowError("price", 3, "it is dear", "t.csv", "line")))
    assert str(error) == "t.csv, line 3, column 'price': it is dear"
    assert (error.column, error.row, error.problem) == ("price", 3, "it is dear")


def test_dates_are_refused():
    with pytest.raises(GatesError, match="column 'day' has type Date, a number was expected"):
        numbers_of(pl.Series("day", [datetime.date(2022, 4, 8)]))


def test_words_for_true_and_false_are_numbers():
    found = numbers_of(pl.Series("y", ["true", "False", None, "1", "0.5"]))
    np.testing.assert_array_equal(found, [1, 0, np.nan, 1, 0.5])
    with pytest.raises(RowError, match="row 1, column 'y': 'yes' is no number"):
        numbers_of(pl.Series("y", ["true", "yes"]))


INTEGERS = {
    "integers": (pl.Series([3, -124, None], dtype=pl.Int16), [3, -124, MISSING]),
    "unsigned": (pl.Series([3, 2**64 - 1, None], dtype=pl.UInt64), [3, UNREADABLE, MISSING]),
    "floats": (
        pl.Series([3.0, -1.0, 3.5, float("nan"), float("inf"), None, 1e300]),
        [3, -1, UNREADABLE, MISSING, MISSING, MISSING, UNREADABLE],
    ),
    "strings": (
        pl.Series(["3", "3.0", "-1", "", None, "x", "3.5"]),
        [3, 3, -1, MISSING, MISSING, UNREADABLE, UNREADABLE],
    ),
    "booleans": (pl.Series([True, False, None]), [1, 0, MISSING]),
    "categories": (pl.Series(["3", None], dtype=pl.Categorical), [3, MISSING]),
    "nothing": (pl.Series([None, None]), [MISSING, MISSING]),
}

STRINGS = {
    "integers": (pl.Series([3, -124, None]), ["3", "-124", ""]),
    "floats": (pl.Series([3.0, 3.5, float("nan"), None, float("-inf")]), ["3", "3.5", "", "", ""]),
    "strings": (pl.Series(["3", "", None, " x"]), ["3", "", "", " x"]),
    "booleans": (pl.Series([True, None]), ["true", ""]),
    "categories": (pl.Series(["b", None], dtype=pl.Categorical), ["b", ""]),
    "nothing": (pl.Series([None]), [""]),
}


@pytest.mark.parametrize("case", INTEGERS)
def test_integers(case):
    column, expected = INTEGERS[case]
    assert canonical(column, "integer").to_list() == expected


@pytest.mark.parametrize("case", STRINGS)
def test_strings(case):
    column, expected = STRINGS[case]
    assert canonical(column, "string").to_list() == expected


@pytest.mark.parametrize(
    "column",
    [pl.Series("day", [datetime.date(2022, 4, 8)]), pl.Series("tags", [[1]])],
    ids=["date", "list"],
)
def test_other_types_are_refused(column):
    with pytest.raises(GatesError, match=f"column '{column.name}' has type"):
        canonical(column, "integer")


def test_the_kind_is_that_of_the_type():
    assert kind_of("x", pl.Int8()) == kind_of("x", pl.Boolean()) == "integer"
    assert kind_of("x", pl.String()) == kind_of("x", pl.Enum(["a"])) == "string"
    assert kind_of("x", pl.Null()) is None


def test_decimals_are_read_as_numbers():
    whole = pl.Series("id", [7, None, 2**60]).cast(pl.Decimal(20, 0))
    assert canonical(whole, "integer").to_list() == [7, -1, 2**60]
    assert canonical(whole, "string").to_list() == ["7", "", str(2**60)]
    prices = pl.Series("p", ["8.50", "7.00", None]).cast(pl.Decimal(10, 2))
    assert kind_of("p", prices.dtype) == "integer"
    assert canonical(prices, "integer").to_list() == [UNREADABLE, 7, -1]
    assert canonical(prices, "string").to_list() == ["8.5", "7", ""]


def test_words_for_true_and_false_are_integers():
    words = pl.Series("b", ["true", "False", "TRUE", "truth", None, "1", ""])
    assert canonical(words, "integer").to_list() == [1, 0, 1, UNREADABLE, -1, 1, -1]
    assert canonical(pl.Series("b", [True, False, None]), "integer").to_list() == [1, 0, -1]


WORD = 2**64
GOLDEN = 0x9E3779B97F4A7C15


def splitmix(value):
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % WORD
    return value ^ (value >> 31)


def defined(text, seed=0):
    """The hash of a string, by its definition and with Python's integers."""
    content = text.encode()
    found = splitmix(((len(content) + 1) * GOLDEN + GOLDEN * (2 * seed + 1)) % WORD)
    for start in range(0, len(content), 8):
        found = splitmix(
            found ^ int.from_bytes(content[start : start + 8].rjust(8, b"\0"), "little")
        )
    return found


def test_the_finalizer_is_that_of_splitmix():
    # The first numbers of SplitMix64 from state 0, as published with Xoshiro.
    states = np.arange(1, 4, dtype=np.uint64) * np.uint64(GOLDEN)
    assert mix(states).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@settings(max_examples=40)
@given(st.lists(st.text(max_size=40), min_size=1), st.integers(0, 5), st.integers(0, 3))
def test_strings_follow_the_definition(texts, seed, skipped):
    column = pl.Series(["left out"] * skipped + texts)[skipped:]
    assert hash_strings(column, seed).tolist() == [defined(text, seed) for text in texts]


def test_hashes_never_change():
    column = pl.Series(["", "a", "12345678", "Straße", "x" * 17])
    assert [f"{value:016x}" for value in hash_strings(column)] == FROZEN_STRINGS
    assert [f"{v:016x}" for v in hash_integers(np.array([0, 1, -1, 2**62]))] == FROZEN_INTEGERS


FROZEN_STRINGS = [
    "6e789e6aa1b965f4",
    "9be8fc30d233f9b6",
    "197bf0c2f17169e1",
    "b3092d1b8fb96bda",
    "7224428bb87e4881",
]
FROZEN_INTEGERS = ["e220a8397b1dcdaf", "910a2dec89025cc1", "e4d971771b652c20", "00aa50ea8e0fa9eb"]


def test_null_is_hashed_as_the_empty_string():
    assert len(set(hash_strings(pl.Series(["", None, "a"])).tolist())) == 2
    assert hash_strings(pl.Series([], dtype=pl.String)).shape == (0,)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), unique=True))
def test_integers_never_collide(values):
    assert len(set(hash_integers(np.array(values, np.int64)).tolist())) == len(values)


def test_the_order_of_a_pair_matters():
    one, other = hash_integers(np.arange(1000)), hash_integers(np.arange(1000), seed=7)
    assert (combine(one, other) != combine(other, one)).all()
    assert len(np.unique(combine(one, other))) == 1000


@pytest.mark.parametrize("buckets", [1, 7, 1000, 2**31])
def test_buckets_are_filled_evenly(buckets):
    found = bucket(hash_integers(np.arange(100_000)), buckets)
    assert found.min() >= 0
    assert found.max() < buckets
    if buckets <= 1000:
        expected = 100_000 / buckets
        counts = np.bincount(found, minlength=buckets)
        assert np.abs(counts - expected).max() <= 6 * np.sqrt(expected)


MANY_INTEGERS = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(-3, 50))


@given(st.lists(MANY_INTEGERS, unique=True), st.lists(MANY_INTEGERS))
def test_it_finds_what_a_dictionary_finds(keys, sought):
    rows = np.arange(5, 5 + len(keys))
    known = dict(zip(keys, rows.tolist(), strict=True))
    asked = np.array([*keys, *sought], np.int64)
    found = RowIndex(np.array(keys, np.int64), rows).find(asked)
    assert found.tolist() == [known.get(key, 0) for key in asked.tolist()]


@pytest.mark.parametrize("keys", [np.arange(1000), np.arange(1000) * 2**40, -1 - np.arange(1000)])
def test_large_tables(keys):
    index = RowIndex(keys, 2 + np.arange(1000))
    assert index.direct == (keys[-1] == 999)
    assert (index.find(keys) == 2 + np.arange(1000)).all()
    assert (index.find(np.array([1000, 2**40 + 1, 2**63 - 1, -1001, -(2**63)])) == 0).all()


def test_keys_with_one_hash_are_all_found():
    # Multiples of 2^52 have few distinct hashes in a table of 256 slots.
    keys = np.arange(64, dtype=np.int64) << 52
    assert (RowIndex(keys, 1 + np.arange(64)).find(keys) == 1 + np.arange(64)).all()


@pytest.mark.parametrize("keys", [[3, 4, 3], [2**60, 5, 2**60]])
def test_equal_keys_are_refused(keys):
    with pytest.raises(ValueError, match="two keys"):
        RowIndex(np.array(keys), np.array([2, 3, 4]))


FRACTIONS = np.arange(1, 16) / 16


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60))
def test_few_values_are_exact(values):
    sketch = QuantileSketch(64)
    sketch.add(np.array(values))
    expected = np.quantile(values, FRACTIONS, method="inverted_cdf")
    assert (sketch.quantiles(FRACTIONS) == expected).all()


@pytest.mark.parametrize("ordered", [False, True])
def test_many_values_stay_within_the_bound(ordered):
    values = np.random.default_rng(0).lognormal(size=100_000)
    values = np.sort(values) if ordered else values
    sketch = QuantileSketch(512)
    for part in np.array_split(values, 77):
        sketch.add(part)
    ranks = np.searchsorted(np.sort(values), sketch.quantiles(FRACTIONS)) / len(values)
    bound = np.log2(2 * len(values) / 512) / 512
    assert np.abs(ranks - FRACTIONS).max() < bound
    assert sum(map(len, sketch._levels)) < 512 * 10


@given(st.lists(st.integers(1, 40), max_size=20))
def test_batches_change_nothing(sizes):
    values = np.random.default_rng(1).normal(size=sum(sizes))
    whole, parts = QuantileSketch(16), QuantileSketch(16)
    whole.add(values)
    for part in np.split(values, np.cumsum(sizes)):
        parts.add(part)
    assert np.array_equal(whole.quantiles(FRACTIONS), parts.quantiles(FRACTIONS), equal_nan=True)


def test_odd_and_even_places_go_up_in_turn():
    sketch = QuantileSketch(4)
    sketch.add(np.arange(8.0))
    assert sketch.quantiles([0.0, 1.0]).tolist() == [0, 5]


def test_nothing_has_no_quantiles():
    assert np.isnan(QuantileSketch().quantiles([0.5])).all()


N = 4000


@pytest.fixture
def labels():
    return np.random.default_rng(0).random((N, 1)) < 0.2


def area(column, labels, mask=None):
    mask = np.ones(labels.shape, bool) if mask is None else mask
    return column_aucs(pl.Series("c", column), labels.astype(np.float32), mask)[0]


def test_numbers_are_judged_by_their_order(labels):
    numbers = labels[:, 0] + np.random.default_rng(1).normal(size=N)
    expected = roc_auc_score(labels[:, 0], numbers)
    assert area(numbers, labels) == pytest.approx(expected, abs=1e-12)
    assert area(-numbers, labels) == pytest.approx(expected, abs=1e-12)


def test_categories_are_judged_by_their_means(labels):
    kind = np.where(labels[:, 0], "a", "b")
    assert area(kind, labels) == 1.0
    draw = np.random.default_rng(2)
    noisy = np.where(draw.random(N) < 0.8, kind, draw.choice(["a", "b"], N))
    two = roc_auc_score(labels[:, 0], noisy == "a")
    assert area(noisy, labels) == pytest.approx(two, abs=0.02)


def test_a_band_of_numbers_is_seen():
    numbers = np.random.default_rng(3).normal(size=N)
    labels = (np.abs(numbers) > 1.2)[:, None]
    assert area(numbers, labels) > 0.99
    assert max(roc_auc_score(labels[:, 0], numbers), 0.5) < 0.55


def test_where_it_is_missing_is_seen(labels):
    numbers = np.where(labels[:, 0], np.nan, np.random.default_rng(4).normal(size=N))
    assert area(numbers, labels) > 0.99


def test_distinct_values_predict_nothing(labels):
    assert area([f"id{k}" for k in range(N)], labels) < 0.55
    assert area(np.random.default_rng(5).permutation(N), labels) < 0.55


def test_masked_rows_do_not_count(labels):
    kind = np.where(labels[:, 0], "a", "b")
    kind[: N // 2] = "c"
    assert area(kind, labels, np.arange(N)[:, None] >= N // 2) == 1.0
    assert area(kind, labels) < 0.9


def test_a_class_without_rows_is_not_judged():
    assert np.isnan(area([1, 2, 3], np.zeros((3, 1), bool)))
