import dataclasses
import datetime
import json

import numpy as np
import polars as pl
import pytest
import torch

from core_gates.errors import GatesError
from recsys.columns.canonical import RowError
from recsys.schema import Crossed, Dense, FeatureSchema, History, Sparse, Task
from recsys.transform import FeatureTransform
from recsys.transform.feature_transform import BLOCK


@pytest.fixture
def schema():
    return FeatureSchema(
        tasks=(Task("bought"), Task("liked", mask="bought")),
        sparse=(
            Sparse("reader", side="user"),
            Sparse("book", min_count=2, side="item"),
            Sparse("shop", storage="hash", buckets=50),
        ),
        dense=(Dense("price"), Dense("pages", scaling="standardize"), Dense("age", "buckets", 4)),
        sequences=(History("read", of="book", max_length=3),),
        crossed=(Crossed(("reader", "book"), buckets=100),),
        user="reader",
        time="day",
        weight="weight",
    )


@pytest.fixture
def table():
    return pl.DataFrame(
        {
            "day": [1, 2, 3, 4, 5, 6],
            "reader": ["ann", "bob", "ann", None, "ann", ""],
            "book": [11, 12, 11, 12, 13, -1],
            "shop": [1, 2, 3, 1, 2, None],
            "price": [0.0, 9.0, 99.0, None, float("inf"), float("nan")],
            "pages": [100, 300, 200, 200, None, 200],
            "age": [1.0, 2.0, 3.0, 4.0, 5.0, None],
            "read": [[], [11], [11, 12, 99], [12, 11, 11, 12], None, [None, 12]],
            "bought": [1, 0, 1, 0, 1, 0],
            "liked": [1, None, 0, None, 1, None],
            "weight": [1.0, 2.0, 0.0, 1.0, 1.0, 1.0],
        }
    )


def same(one, other):
    assert (one.sparse == other.sparse).all()
    assert (one.dense == other.dense).all()
    assert len(one.sequences) == len(other.sequences)
    for a, b in zip(one.sequences, other.sequences, strict=True):
        assert (a == b).all()


@pytest.fixture
def transform(schema, table):
    return FeatureTransform(schema).fit(table)


def test_rows_of_the_tables(transform, table):
    found = transform.encode(table).sparse
    assert found[:, 0].tolist() == [2, 3, 2, 1, 2, 1]
    assert found[:, 1].tolist() == [2, 3, 2, 3, 0, 1]  # 13 was seen once
    shop, crossed, age = found[:, 2], found[:, 3], found[:, 4]
    assert shop[0] == shop[3] > 1
    assert shop[1] == shop[4] > 1
    assert shop[5] == 1
    assert crossed[0] == crossed[2] > 1
    assert crossed[3:].tolist() == [1, crossed[4], 1]
    assert len({crossed[0], crossed[1], crossed[4]}) == 3  # unknown values are combined, too
    assert age.tolist() == [2, 3, 4, 5, 5, 1]


def test_numbers_are_scaled_and_missing_ones_marked(transform, table):
    found = transform.encode(table).dense
    logs = np.log1p([0.0, 9.0, 99.0])
    assert found[:3, 0] == pytest.approx((logs - logs.mean()) / logs.std(), rel=1e-6)
    pages = np.array([100, 300, 200, 200, 200])
    known = [0, 1, 2, 3, 5]
    assert found[known, 1] == pytest.approx((pages - pages.mean()) / pages.std(), rel=1e-6)
    assert (found[3:, 0].tolist(), found[4, 1]) == ([0, 0, 0], 0)
    assert (found[:, 2].tolist(), found[:, 3].tolist()) == ([0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 0])
    assert transform.dense_names == ("price", "pages", "price missing", "pages missing")
    assert transform.dense_width == 4


def test_histories_end_with_the_newest(transform, table):
    (found,) = transform.encode(table).sequences
    assert found.tolist() == [
        [1, 1, 1], [1, 1, 2], [2, 3, 0], [2, 2, 3], [1, 1, 1], [1, 1, 3],
    ]  # fmt: skip


def test_sizes(transform):
    assert transform.fitted[:3] == (6, 1, 6)
    assert transform.sizes == {"reader": 4, "book": 4, "shop": 52, "reader x book": 102, "age": 6}
    assert transform.sparse_tables == {
        "reader": "reader",
        "book": "book",
        "shop": "shop",
        "reader x book": "reader x book",
        "age": "age",
    }


def test_batch(transform, table):
    batch = transform.batch(table)
    same_rows = transform.encode(table)
    assert (batch.sparse.numpy() == same_rows.sparse).all()
    assert batch.labels.tolist() == [[1, 1], [0, 0], [1, 0], [0, 0], [1, 1], [0, 0]]
    assert batch.mask[:, 0].all()
    assert batch.mask[:, 1].tolist() == [True, False, True, False, True, False]
    assert batch.weight.tolist() == [1, 2, 0, 1, 1, 1]
    user = batch.user
    assert user[0] == user[2] == user[4]
    assert user[0] != user[1]
    assert user[3] != user[5]
    assert max(user[3], user[5]) < 0 <= min(user[0], user[1])
    assert [t.dtype for t in batch.plain()] == [
        torch.int64, torch.float32, torch.float32, torch.bool, torch.float32, torch.int64,
        torch.float32,
    ]  # fmt: skip


def test_scoring_needs_no_labels(transform, table):
    bare = table.drop("bought", "liked", "weight")
    batch = transform.batch(bare, labels=False)
    assert not batch.mask.any()
    assert (batch.sparse == transform.batch(table).sparse).all()
    with pytest.raises(GatesError, match="the table lacks 'bought'"):
        transform.batch(bare)


def test_labels_need_their_user(schema, table):
    schema = dataclasses.replace(schema, user="client")
    transform = FeatureTransform(schema).fit(table)
    assert len(transform.batch(table, labels=False)) == 6
    with pytest.raises(GatesError, match="lacks the column 'client' of the user"):
        transform.batch(table)


ALIKE = {
    "shuffled columns": lambda t: t.select(sorted(t.columns, reverse=True)),
    "further columns": lambda t: t.with_columns(new=pl.lit("x")),
    "numbers as text": lambda t: t.with_columns(
        pl.col("book", "shop", "price", "pages", "age").cast(pl.String),
        pl.col("read").cast(pl.List(pl.String)),
    ),
    "whole numbers as floats": lambda t: t.with_columns(
        pl.col("book", "shop").cast(pl.Float64), pl.col("read").cast(pl.List(pl.Float64))
    ),
    "small integers": lambda t: t.with_columns(pl.col("book", "shop", "pages").cast(pl.Int16)),
    "categories": lambda t: t.with_columns(pl.col("reader").cast(pl.Categorical)),
    "nulls for NaN": lambda t: t.with_columns(pl.col("price", "age").fill_nan(None)),
}


@pytest.mark.parametrize("case", ALIKE)
def test_other_forms_of_the_same_table_are_read_alike(case, transform, table):
    same(transform.encode(ALIKE[case](table)), transform.encode(table))


def test_lists_of_one_length(transform, table):
    fixed = table.with_columns(read=pl.Series([[11, 12]] * 6, dtype=pl.Array(pl.Int64, 2)))
    assert transform.encode(fixed).sequences[0].tolist() == [[1, 2, 3]] * 6


def test_blocks_join_without_seams(transform, table):
    repeats = BLOCK // 6 + 2
    long, short = transform.encode(pl.concat([table] * repeats)), transform.encode(table)
    assert len(long.sparse) > BLOCK
    assert (long.sparse == np.tile(short.sparse, (repeats, 1))).all()
    assert (long.dense == np.tile(short.dense, (repeats, 1))).all()
    assert (long.sequences[0] == np.tile(short.sequences[0], (repeats, 1))).all()


def test_no_rows(transform, table):
    assert transform.encode(table[:0]).sparse.shape == (0, 5)
    assert len(transform.batch(table[:0])) == 0


def test_absent_columns(transform, table):
    less = table.drop("shop", "price", "read", "age")
    with pytest.raises(GatesError, match="the table lacks 'shop', 'price', 'age', 'read'"):
        transform.encode(less)
    found = transform.encode(less, fill_absent=True)
    assert (found.sparse[:, [2, 4]] == 1).all()
    assert (found.dense[:, 0] == 0).all()
    assert (found.dense[:, 2] == 1).all()
    assert (found.sequences[0] == 1).all()
    assert (found.sparse[:, :2] == transform.encode(table).sparse[:, :2]).all()


FAULTS = {
    "text for a number": ({"price": ["1", "2", "x", "3", "4", "5"]}, "row 2, column 'price'"),
    "label of 2": ({"bought": [0, 1, 0, 1, 2, 1]}, "row 4, column 'bought': it is 2"),
    "label missing": ({"bought": [0, None, 0, 1, 1, 1]}, "row 1, column 'bought': it is missing"),
    "masked label of 5": ({"liked": [1, 0, 5, 0, 1, 1]}, "row 2, column 'liked': it is 5"),
    "label missing where it counts": ({"liked": [1, 0, None, 0, 1, 1]}, "row 2, column 'liked'"),
    "negative weight": ({"weight": [1.0, -1.0, 1, 1, 1, 1]}, "row 1, column 'weight': it is -1"),
    "missing weight": ({"weight": [1.0, 1, 1, None, 1, 1]}, "row 3, column 'weight': it is miss"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faulty_cells_are_named(case, transform, table):
    columns, words = FAULTS[case]
    faulty = table.with_columns(**{n: pl.Series(v, strict=False) for n, v in columns.items()})
    with pytest.raises(RowError, match=words):
        transform.batch(faulty)


def test_a_faulty_cell_far_down_is_named_by_its_row(transform, table):
    long = pl.concat([table] * (BLOCK // 6 + 2)).with_columns(pl.col("price").cast(pl.String))
    row = BLOCK + 3
    marked = pl.when(pl.int_range(pl.len()) == row).then(pl.lit("dear")).otherwise("price")
    with pytest.raises(RowError, match=f"row {row}, column 'price'"):
        transform.encode(long.with_columns(price=marked))


WRONG_TYPES = {
    "dates": ("book", pl.Series([0] * 6).cast(pl.Date), "column 'book' has type Date"),
    "lists": ("shop", pl.Series([[1]] * 6), r"column 'shop' has type List\(Int64\)"),
    "no lists": ("read", pl.Series([12] * 6), "column 'read' has type Int64, a history needs"),
}


@pytest.mark.parametrize("case", WRONG_TYPES)
def test_wrong_types_are_refused(case, transform, table):
    name, column, words = WRONG_TYPES[case]
    with pytest.raises(GatesError, match=words):
        transform.encode(table.with_columns(column.alias(name)))


def test_constant_and_empty_columns():
    schema = FeatureSchema(
        tasks=(Task("y"),),
        dense=(
            *(Dense("c", "standardize"), Dense("e"), Dense("b", "buckets"), Dense("n", "none")),
            Dense("p", "buckets", 4),
        ),
    )
    table = pl.DataFrame({"c": [0.1] * 7, "e": [None] * 7, "b": [3] * 7, "n": [1e300] * 7})
    table = table.with_columns(p=pl.Series(range(7)))
    found = FeatureTransform(schema).fit(table).encode(table)
    assert (found.dense[:, 0] == 0).all()
    assert (found.dense[:, 1] == 0).all()
    assert (found.dense[:, 4] == 1).all()
    assert np.isfinite(found.dense).all()
    other = FeatureTransform(schema).fit(table).encode(table.with_columns(c=pl.lit(2.1)))
    assert other.dense[:, 0] == pytest.approx(2.0)
    assert [len(set(rows)) for rows in found.sparse.T.tolist()] == [1, 4]


def test_a_range_too_wide_is_refused():
    schema = FeatureSchema(tasks=(Task("y"),), dense=(Dense("x", "standardize"),))
    with pytest.raises(GatesError, match="column 'x' reaches from -1e"):
        FeatureTransform(schema).fit(pl.DataFrame({"x": [-1e300, 1e300]}))
    schema = FeatureSchema(tasks=(Task("y"),), dense=(Dense("x"),))
    table = pl.DataFrame({"x": [-1e300, 1e300]})
    assert FeatureTransform(schema).fit(table).encode(table).dense[:, 0].tolist() == [-1, 1]


def test_batches_are_fitted_like_one_table(schema, table, transform):
    parts = FeatureTransform(schema).fit_batches(table[n : n + 2] for n in range(0, 6, 2))
    same(parts.encode(table), transform.encode(table))
    assert parts.fitted == transform.fitted


def test_numbers_become_text_where_a_later_batch_has_text():
    schema = FeatureSchema(tasks=(Task("y"),), sparse=(Sparse("c"),))
    one, other = pl.DataFrame({"c": [7, 7]}), pl.DataFrame({"c": ["x", "7"]})
    made = FeatureTransform(schema).fit_batches([one, other])
    assert made.encode(one).sparse[:, 0].tolist() == [2, 2]
    assert made.encode(other).sparse[:, 0].tolist() == [3, 2]
    assert FeatureTransform(schema).fit_batches([other, one]).sizes == made.sizes


def test_features_share_a_table():
    schema = FeatureSchema(
        tasks=(Task("y"),), sparse=(Sparse("a", table="word"), Sparse("b", table="word"))
    )
    table = pl.DataFrame({"a": ["x", "y"], "b": ["y", "z"]})
    made = FeatureTransform(schema).fit(table)
    assert (made.sizes, made.encode(table).sparse.tolist()) == ({"word": 5}, [[3, 2], [2, 4]])


def test_tables_that_contradict_are_refused():
    two = (Sparse("a", table="word"), Sparse("b", table="word", min_count=2))
    with pytest.raises(ValueError, match="share the table 'word'"):
        FeatureTransform(FeatureSchema(tasks=(Task("y"),), sparse=two))
    clash = FeatureSchema(
        tasks=(Task("y"),), sparse=(Sparse("a", table="d"),), dense=(Dense("d", "buckets"),)
    )
    with pytest.raises(ValueError, match="two tables are named 'd'"):
        FeatureTransform(clash)


def test_growth_keeps_every_row_and_scale(transform, table):
    day = table.with_columns(
        reader=pl.lit("eve"), book=pl.lit(77), day=pl.lit(9), price=pl.lit(1e6)
    )
    grown = transform.grow(day)
    same(grown.encode(table), transform.encode(table))
    assert grown.encode(day).sparse[:, :2].tolist() == [[4, 4]] * 6
    assert transform.encode(day).sparse[:, :2].tolist() == [[0, 0]] * 6
    assert (grown.sizes["book"], grown.fitted[:3]) == (transform.sizes["book"] + 1, (12, 1, 9))


HISTORIES = {
    "lists": pl.Series([["1", "NA", "2"], ["NA"], ["3"], ["1", "2"], None]),
    "arrays": pl.Series([["NA", "1", "NA", "2"]], dtype=pl.Array(pl.String, 4)),
    "text": pl.Series(["1|NA|2", "NA", "3", "1|2", None]),
    "text with spaces": pl.Series(["1 | NA|2 ", " NA ", " 3", "1| 2", "  "]),
    "categories": pl.Series(["1|NA|2", "NA", "3", "1|2", None]).cast(pl.Categorical),
}


@pytest.mark.fault("video R11")
@pytest.mark.parametrize("kind", HISTORIES)
@pytest.mark.parametrize("strings", [False, True])
def test_missing_words_in_histories_are_missing_events_in_any_form(kind, strings):
    schema = FeatureSchema(
        tasks=(Task("y"),), sparse=(Sparse("i"),), sequences=(History("h", "i", max_length=3),)
    )
    items = pl.Series("i", [1, 2, 3]).cast(pl.String if strings else pl.Int64)
    train = pl.DataFrame({"i": items, "h": ["1", "2", "3"]})
    transform = FeatureTransform(schema, missing=["NA"]).fit(train)
    table = pl.DataFrame({"h": HISTORIES[kind]}).with_columns(i=pl.lit("1"))
    found = transform.encode(table).sequences[0].tolist()
    assert found == [[2, 1, 3], [1, 1, 1], [1, 1, 4], [1, 2, 3], [1, 1, 1]][: len(table)]


@pytest.mark.fault("video R7")
def test_numbers_grow_alike_from_text_and_from_numbers():
    """Text writes 7 in many ways, and words that are no number grow nothing."""
    schema = FeatureSchema(tasks=(Task("y"),), sparse=(Sparse("item", min_count=2),))
    first = FeatureTransform(schema).fit(pl.DataFrame({"item": [1, 1, 2, 2]}))
    numbers = pl.Series("item", [7, 7, 7, 8, 8, 1, 1, 9, None, -1])
    text = pl.Series("item", ["7", "07", "7.0", "8.0", "8", "1", "true", "9", "x", "-1"])
    grown = first.grow(text.to_frame())
    expected, found = first.grow(numbers.to_frame()).tables["item"], grown.tables["item"]
    assert found.values.to_list() == expected.values.to_list() == [1, 2, 7, 8]
    assert found.counts.tolist() == expected.counts.tolist() == [4, 2, 3, 2]
    assert grown.encode(text.to_frame()).sparse[:, 0].tolist() == [4, 4, 4, 5, 5, 2, 2, 0, 0, 1]


def test_no_rows_or_no_fit(schema, table, transform):
    with pytest.raises(GatesError, match="no training rows"):
        FeatureTransform(schema).fit(table[:0])
    for call in ("encode", "batch", "grow"):
        with pytest.raises(GatesError, match="has learned from no rows"):
            getattr(FeatureTransform(schema), call)(table)


def test_a_faulty_row_of_a_later_batch_is_counted_from_the_first(schema, table):
    faulty = table.with_columns(price=pl.Series(["1", "x", "1", "1", "1", "1"]))
    with pytest.raises(RowError, match="row 7, column 'price'"):
        FeatureTransform(schema).fit_batches([table, faulty])


def test_crosses_are_those_of_values_not_of_rows():
    schema = FeatureSchema(
        tasks=(Task("y"),),
        sparse=(Sparse("a"), Sparse("b")),
        crossed=(Crossed(("a", "b"), buckets=1000), Crossed(("b", "a"), buckets=1000)),
    )
    table = pl.DataFrame({"a": [1, 2, 2], "b": [2, 1, 2]})
    few, all_ = FeatureTransform(schema).fit(table[2:]), FeatureTransform(schema).fit(table)
    assert (few.encode(table).sparse[:, 2:] == all_.encode(table).sparse[:, 2:]).all()
    assert len(np.unique(all_.encode(table).sparse[:, 2])) == 3
    assert (few.encode(table).sparse[:2, 2] != few.encode(table).sparse[:2, 3]).all()


@pytest.fixture
def folder(schema, table, tmp_path):
    return FeatureTransform(schema).fit(table).save(tmp_path / "transform")


def test_saved_and_loaded(schema, table, folder):
    made, loaded = FeatureTransform(schema).fit(table), FeatureTransform.load(folder)
    assert (loaded.schema, loaded.fitted, loaded.sizes) == (schema, made.fitted, made.sizes)
    same(made.encode(table), loaded.encode(table))
    assert loaded.grow(table).fitted.rows == 12


def test_equal_transforms_make_equal_files(schema, table, folder, tmp_path):
    other = FeatureTransform.load(folder).save(tmp_path / "other")
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["transform.json", "vocabulary_000.parquet", "vocabulary_001.parquet"]
    for name in names:
        assert (folder / name).read_bytes() == (other / name).read_bytes()


def test_saving_again_replaces_the_folder(schema, table, folder):
    small = FeatureSchema(tasks=(Task("bought"),), sparse=(Sparse("shop"),))
    FeatureTransform(small).fit(table).save(folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "transform.json",
        "vocabulary_000.parquet",
    ]
    assert [path.name for path in folder.parent.iterdir()] == ["transform"]


def test_dates_of_the_training_rows_are_kept(tmp_path):
    schema = FeatureSchema(tasks=(Task("y"),), sparse=(Sparse("c"),), time="at")
    days = [datetime.date(2022, 4, 9), datetime.date(2022, 4, 8)]
    made = FeatureTransform(schema).fit(pl.DataFrame({"c": [1, 2], "at": days}))
    assert made.fitted[:3] == (2, "2022-04-08", "2022-04-09")
    loaded = FeatureTransform.load(made.save(tmp_path / "t"))
    later = pl.DataFrame({"c": [3], "at": [datetime.date(2022, 4, 10)]})
    assert loaded.grow(later).fitted[:3] == (3, "2022-04-08", "2022-04-10")
    with pytest.raises(GatesError, match="the time column holds 5 after '2022-04-08'"):
        loaded.grow(pl.DataFrame({"c": [3], "at": [5]}))


def _text(change):
    def apply(folder):
        path = folder / "transform.json"
        path.write_text(change(path.read_text()))

    return apply


def _json(change):
    def edit(text):
        content = json.loads(text)
        change(content)
        return json.dumps(content)

    return _text(edit)


FOREIGN = {
    "no folder": (lambda f: [p.unlink() for p in f.iterdir()], "No such file"),
    "cut off": (_text(lambda text: text[:100]), "holds no transform"),
    "a list": (_text(lambda text: "[1, 2]"), "holds no transform"),
    "another program's": (_text(lambda text: '{"model": 3}'), "holds no transform of features"),
    "a later version's": (_json(lambda c: c.update(format=99)), "its format is 99"),
    "no table": (_json(lambda c: c["tables"].pop("book")), "lacks the table 'book'"),
    "another vocabulary": (
        lambda f: (f / "vocabulary_000.parquet").replace(f / "vocabulary_001.parquet"),
        "vocabulary_000.parquet is no vocabulary",
    ),
    "a longer vocabulary": (
        _json(lambda c: c["tables"]["book"].update(rows=9)),
        "vocabulary_001.parquet has 4 rows, not 9",
    ),
    "an unknown setting": (_json(lambda c: c["schema"].update(shape=2)), "not known"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_folders_are_refused(case, folder):
    change, words = FOREIGN[case]
    change(folder)
    with pytest.raises(GatesError, match=words) as caught:
        FeatureTransform.load(folder)
    assert "\n" not in str(caught.value)
