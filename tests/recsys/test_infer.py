"""Requests of users, and tables, that a stored model scores."""

import dataclasses
import datetime

import numpy as np
import polars as pl
import pytest
import torch

from core_gates import GatesError
from recsys import OwnTable, TableScorer
from recsys.columns.canonical import RowError
from recsys.infer import infer_schema, plain
from recsys.model_folder import load_model
from recsys.schema import FeatureSchema, Product, Task
from recsys.transform import FeatureTransform

N = 3000


@pytest.fixture
def table():
    draw = np.random.default_rng(0)
    reader, book = draw.integers(0, 90, N), draw.integers(0, 1500, N)
    bought = draw.random(N) < 0.3
    return pl.DataFrame(
        {
            "row": np.arange(N),
            "reader": [f"r{k}" for k in reader],
            "city": [f"c{k % 7}" for k in reader],
            "book": book,
            "author_id": book // 3,
            "pages": 100 + book * 7 % 913,
            "price": draw.lognormal(1, 2, N),
            "temperature": draw.normal(0, 9, N),
            "hour": draw.integers(0, 24, N),
            "stock": draw.integers(0, 5000, N),
            "streamer": draw.choice([1, 0, -124], N),
            "gift": draw.random(N) < 0.1,
            "shelf": draw.choice([1.0, 2.0, float("nan")], N),
            "read": [draw.integers(0, 1500, k % 4).tolist() for k in range(N)],
            "words": [["x"]] * N,
            "at": [datetime.datetime(2024, 1, 1)] * N,
            "day": ["2024-01-01"] * (N - 1) + ["2024-01-02"],
            "session": [f"s{k}" for k in range(N)],
            "shop": ["main"] * N,
            "nothing": [None] * N,
            "returned": ~bought,
            "paid": np.where(bought, draw.lognormal(size=N), 0.0),
            "mood": np.where(bought, draw.random(N) + 0.55, draw.random(N)),
            "bought": bought.astype(int),
            "liked": (draw.random(N) < 0.2).astype(int),
            "w": np.ones(N),
            "t": draw.permutation(N),
        }
    )


@pytest.fixture
def drafted(table):
    labels = {"bought": "sale", "liked": "taste"}
    return infer_schema(table, labels, user="reader", item="book", time="t", weight="w")


def test_kinds_of_columns(drafted):
    sparse = {f.name: f for f in drafted.schema.sparse}
    assert set(sparse) == {
        "reader", "city", "book", "author_id", "hour", "streamer", "gift", "shelf",
    }  # fmt: skip
    assert {f.name: f.scaling for f in drafted.schema.dense} == {
        "pages": "standardize",
        "price": "log_standardize",
        "temperature": "standardize",
        "stock": "standardize",
        "mood": "standardize",
    }
    (history,) = drafted.schema.sequences
    assert (history.name, history.of, history.max_length) == ("read", "book", 3)
    assert (sparse["book"].min_count, sparse["city"].min_count) == (2, 1)


def test_whom_a_column_describes(drafted):
    sides = {f.name: f.side for f in (*drafted.schema.sparse, *drafted.schema.dense)}
    users = {name for name, side in sides.items() if side == "user"}
    items = {name for name, side in sides.items() if side == "item"}
    assert (users, items) == ({"reader", "city"}, {"book", "author_id", "pages"})


def test_tasks_and_keys(drafted):
    schema = drafted.schema
    assert schema.tasks == (Task("bought", category="sale"), Task("liked", category="taste"))
    assert (schema.user, schema.item, schema.time, schema.weight) == ("reader", "book", "t", "w")


LEFT_OUT = {
    "row": "it numbers the rows",
    "words": "its lists hold the values of no sparse feature",
    "at": "times, with few hours and days",
    "day": "times, with few hours and days",
    "session": "text that is different in nearly every row",
    "shop": "constant",
    "nothing": "all missing",
    "returned": "it is the label 'bought', or its opposite",
    "paid": "it predicts the label 'bought' alone, with AUC 1.000",
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_is_left_out_and_why(name, drafted):
    (note,) = [note for note in drafted.notes if note.column == name]
    assert note.decision == "left out"
    assert note.reason.startswith(LEFT_OUT[name])
    assert name not in drafted.schema.features


def test_every_column_has_its_note(drafted, table):
    *noted, product = drafted.notes
    columns = [name for name in table.columns if name not in ("bought", "liked")]
    assert [note.column for note in noted] == columns
    assert drafted.schema.products == (Product(("reader", "city"), ("book", "author_id")),)
    assert str(product).startswith("(reader + city) * (book + author_id): product, how well")
    mood = next(str(note) for note in drafted.notes if note.column == "mood")
    assert "AUC 0.9" in mood
    assert "alone for 'bought': is it known before?" in mood
    assert "-124 as missing" in str(next(n for n in drafted.notes if n.column == "streamer"))


def test_the_draft_can_be_fitted(drafted, table):
    batch = FeatureTransform(drafted.schema).fit(table).batch(table)
    assert (len(batch), batch.labels.mean(0).tolist()) == (N, pytest.approx([0.3, 0.2], abs=0.03))


def test_columns_are_dropped_as_told(table):
    drafted = infer_schema(table, ["bought"], drop=["mood", "liked"])
    assert not {"mood", "liked"} & set(drafted.schema.features)
    assert {"mood", "liked"} < set(infer_schema(table, [Task("bought")]).schema.features)


def test_a_large_table_is_sampled(table, monkeypatch):
    import recsys.infer

    whole = infer_schema(table, ["bought"], user="reader").schema
    monkeypatch.setattr(recsys.infer, "MOST_ROWS", 1000)
    assert infer_schema(table, ["bought"], user="reader").schema.features == whole.features


FAULTS = {
    "no label": (lambda t: infer_schema(t, ["sold"]), GatesError, "the table lacks 'sold'"),
    "no user": (
        lambda t: infer_schema(t, ["bought"], user="client"),
        GatesError,
        "the table lacks 'client'",
    ),
    "a label that is a number": (
        lambda t: infer_schema(t, ["hour"]),
        RowError,
        "column 'hour': it is",
    ),
    "no rows": (lambda t: infer_schema(t[:0], ["bought"]), GatesError, "no rows"),
    "no features": (
        lambda t: infer_schema(t.select("bought", "shop"), ["bought"]),
        GatesError,
        "no column is left that could be a feature: shop: left out, constant",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults(case, table):
    call, kind, words = FAULTS[case]
    with pytest.raises(kind, match=words):
        call(table)


def test_numbers_with_a_decimal_comma_are_refused(table):
    commas = table["price"].round(2).cast(pl.String).str.replace(".", ",", literal=True)
    for column in (commas, commas.set(table["hour"] == 3, None).set(table["hour"] == 4, "7")):
        with pytest.raises(GatesError, match="column 'price' has numbers with a comma, such as '"):
            infer_schema(table.with_columns(column.alias("price")), ["bought"])
    words = commas.set(table["hour"] == 4, "free")
    drafted = infer_schema(table.with_columns(words.alias("price")), ["bought"])
    assert "price" in drafted.schema.features
    infer_schema(table.with_columns(commas.alias("price")), ["bought"], drop=["price"])


def test_negative_ids_are_told(table):
    note = {n.column: str(n) for n in infer_schema(table, ["bought"], item="book").notes}["book"]
    assert "WARNING" not in note
    negative = table.with_columns(-pl.col("book"))
    note = {n.column: str(n) for n in infer_schema(negative, ["bought"], item="book").notes}["book"]
    assert "WARNING: 100% of the rows have a negative one, which counts as missing" in note


def test_histories_in_text_are_found(table):
    text = table["read"].cast(pl.List(pl.String)).list.join("|")
    genres = pl.Series(["crime|travel", "poetry", None, "travel|poetry"] * (N // 4))
    drafted = infer_schema(table.with_columns(read=text, genres=genres), ["bought"], item="book")
    (history,) = drafted.schema.sequences
    assert (history.name, history.of, history.max_length) == ("read", "book", 3)
    assert "genres" in {feature.name for feature in drafted.schema.sparse}
    made = FeatureTransform(drafted.schema).fit(table.with_columns(read=text, genres=genres))
    found = made.encode(table.with_columns(read=text, genres=genres)).sequences[0]
    assert (found == made.encode(table.with_columns(genres=genres)).sequences[0]).all()


def test_decimals_and_huge_numbers_are_numbers(table):
    decimal = table["temperature"].round(2).cast(pl.Decimal(12, 2))
    drafted = infer_schema(
        table.with_columns(pl.col("price") * 1e300, temperature=decimal), ["bought"]
    )
    scalings = {feature.name: feature.scaling for feature in drafted.schema.dense}
    assert (scalings["temperature"], scalings["price"]) == ("standardize", "log_standardize")


@pytest.mark.fault("video V27")
@pytest.mark.parametrize("part", [1.0, 0.8, 0.6])
@pytest.mark.parametrize("down", [False, True])
def test_row_numbers_are_known_where_some_rows_are_in_another_part(part, down):
    draw = np.random.default_rng(3)
    kept = draw.random(2000) < part
    numbers = np.arange(2000)[:: -1 if down else 1] + 7
    rows = {"row": numbers, "c": draw.integers(9, size=2000), "y": draw.integers(2, size=2000)}
    rows |= {"size": draw.permutation(numbers), "grown": np.cumsum(draw.integers(1, 99, 2000))}
    drafted = infer_schema(pl.DataFrame(rows).filter(pl.Series(kept)), ["y"])
    assert set(drafted.schema.features) == {"c", "size", "grown"}
    assert "row: left out, it numbers the rows" in map(str, drafted.notes)


@pytest.fixture(scope="module", params=["mean", "transformer"])
def folder(request, shop, tmp_path_factory):
    return shop.write_model(tmp_path_factory.mktemp("model") / "shop", encoder=request.param)


def expected(loaded, table):
    batch = loaded.transform.batch(table)
    with torch.no_grad():
        return loaded.ranker(batch.sparse, batch.dense, batch.sequences).sigmoid().numpy()


@pytest.mark.parametrize("block_rows", [1, 7, 4096])
@pytest.mark.parametrize("owned", [False, True])
def test_probabilities_are_those_of_the_ranker(shop, folder, block_rows, owned):
    loaded, table = load_model(folder), shop.rows(50, 3)
    right = expected(loaded, table)
    scorer = TableScorer(loaded.ranker, loaded.transform, block_rows=block_rows, owned=owned)
    found = scorer.score(table.drop(shop.TASKS))
    np.testing.assert_allclose(found.probabilities, right, atol=1e-6)
    assert right.std(0).min() > 0.01
    np.testing.assert_array_equal(found.unknown, loaded.transform.encode(table).sparse == 0)
    assert found.unknown.any()


@pytest.mark.parametrize("block_rows", [1, 10, 4096])
def test_lists_give_what_rows_give(shop, folder, block_rows):
    loaded = load_model(folder)
    scorer = TableScorer(loaded.ranker, loaded.transform, block_rows=block_rows)
    lists = [shop.as_table(shop.rows(n, n)) for n in (9, 1, 4, 12)]
    table = lists[0].vstack(lists[1]).vstack(lists[2]).vstack(lists[3])
    found = scorer.score(table, [len(rows) for rows in lists])
    np.testing.assert_allclose(found.probabilities, scorer.score(table).probabilities, atol=1e-6)


def test_no_rows_give_no_rows_and_faults_are_named(shop, folder):
    loaded = load_model(folder)
    scorer = TableScorer(loaded.ranker, loaded.transform)
    assert scorer.score(shop.rows(3).clear()).probabilities.shape == (0, 3)
    with pytest.raises(GatesError, match="lacks 'book'"):
        scorer.score(shop.rows(3).drop("book"))
    with pytest.raises(ValueError, match="block_rows"):
        TableScorer(loaded.ranker, loaded.transform, block_rows=0)


@pytest.mark.parametrize("lists", [[5], [5, 6], [13], [-1, 13], [0, 12]])
def test_lists_that_are_not_all_rows_are_refused(shop, folder, lists):
    loaded = load_model(folder)
    scorer = TableScorer(loaded.ranker, loaded.transform)
    with pytest.raises(GatesError, match="expected 12 rows in all, at least one in each"):
        scorer.score(shop.as_table(shop.rows(12)), lists)


@pytest.mark.parametrize("name", ["reader", "city", "age", "last"])
def test_lists_of_several_users_are_refused(shop, folder, name):
    loaded = load_model(folder)
    scorer = TableScorer(loaded.ranker, loaded.transform)
    table = shop.as_table(shop.rows(12))
    values = table[name].to_list()
    values[7] = next(v for v in shop.rows(50)[name].to_list() if v and v != values[0])
    changed = table.with_columns(pl.Series(name, values, table[name].dtype))
    with pytest.raises(GatesError, match=rf"row 7 differs in '{name}( missing)?' from the row bef"):
        scorer.score(changed, [5, 7])
    scorer.score(changed, [7, 1, 4])
    scorer.score(changed[:1], [1])


@pytest.mark.fault("46 R6")
def test_a_label_of_many_numbers_is_a_regression_next_to_one_of_zeros_and_ones(table):
    found = infer_schema(table, {"bought": "sale", "price": "pay"}, user="reader", time="t").schema
    assert found.regressions == (Task("price", category="pay", kind="regression"),)
    assert found.task_names == ("bought",)
    assert "price" not in found.features
    assert FeatureSchema.from_dict(plain(found)) == found
    batch = FeatureTransform(found).fit(table).batch(table)
    expected = np.log(np.maximum(table["price"].to_numpy(), 1.0))
    np.testing.assert_allclose(batch.numbers[:, 0], expected, rtol=1e-6)
    with pytest.raises(GatesError, match="all labels are numbers, as 'price': name one with 0 and"):
        infer_schema(table, ["price"])
    with pytest.raises(RowError, match="a label or mask must be 0 or 1"):
        infer_schema(table, ["bought", "hour"])  # few numbers are no quantity


@pytest.mark.fault("46 R6")
@pytest.mark.parametrize("values", [[0.5, 1.0, 1.5, 5.0], [1, 2, 3, 4, 5], [0.37, *range(90)]])
def test_a_table_with_a_label_of_numbers_is_read(tmp_path, values):
    rows = pl.DataFrame({"click": [0, 1] * 100, "book": [f"b{n % 7}" for n in range(200)]})
    rows = rows.with_columns(rating=pl.Series([values[n % len(values)] for n in range(200)]))
    rows.write_parquet(tmp_path / "log.parquet")
    source = OwnTable(str(tmp_path / "log.parquet"), ["rating", "click"], item="book")
    assert source.read().schema.regressions == (Task("rating", kind="regression"),)
    with pytest.raises(GatesError, match="all labels are numbers, as 'rating'"):
        dataclasses.replace(source, labels=["rating"]).read()


@pytest.mark.fault("46 R5")
def test_a_column_called_like_a_derived_feature_is_refused(table):
    """It took its place without a word."""
    when = 1_650_000_000 + np.random.default_rng(1).integers(0, 10**6, N)
    clash = table.with_columns(when=when, **{"hour of when": np.arange(N) % 7})
    with pytest.raises(GatesError, match="'hour of when' is called like the hour of 'when'"):
        infer_schema(clash, ["bought"])
    assert infer_schema(clash, ["bought"], drop=["when"]).schema


@pytest.mark.fault("46 R5")
def test_large_quantities_are_no_times(table):
    phone = np.random.default_rng(1).integers(2_100_000_000, 4_000_000_000, N)
    found = infer_schema(table.with_columns(calls=phone), ["bought"])
    assert not any(feature.name == "hour of calls" for feature in found.schema.sparse)


@pytest.mark.fault("46 R5")
@pytest.mark.parametrize("scale", [1, 1000])
def test_whole_numbers_that_are_times_are_no_quantities(table, scale):
    when = (1_650_000_000 + np.random.default_rng(1).integers(0, 10**6, N)) * scale
    table = table.with_columns(when=when, when_id=when, amount=when % (10**9 * scale))
    found = infer_schema(table, ["bought"])
    (note,) = [note for note in found.notes if note.column == "when"]
    assert str(note) == "when: left out, times, whose hour and weekday is a feature"
    others = {feature.name for feature in (*found.schema.sparse, *found.schema.dense)}
    assert {"when_id", "amount", "hour of when"} <= others
    assert others.isdisjoint({"when", "hour of when_id", "hour of amount"})
