"""Readers of a user's own table and of public sets."""

import numpy as np
import polars as pl
import pytest

from core_gates.errors import GatesError
from recsys.data.datamodule import TableDataModule
from recsys.data.leaks import find_leaks
from recsys.data.readers import AliExpress, Census, MovieLens, OpenBandit, OwnTable
from recsys.data.readers.census import NUMBERS
from recsys.schema import FeatureSchema, Sparse, Task

ROWS = 120


@pytest.fixture
def path(tmp_path):
    """The log of a bookshop, as CSV."""
    rows = range(ROWS)
    pl.DataFrame(
        {
            "reader": [f"r{k % 12}" for k in rows],
            "book_id": [k * 7 % 60 for k in rows],
            "price": [float(k * 13 % 101) for k in rows],
            "age": [30 + k % 12 for k in rows],
            "day": [f"2024-01-{1 + k // 12:02}" for k in rows],
            "minutes_read": [k * 17 % 300 for k in rows],
            "bought": [int(k * 11 % 7 < 2) for k in rows],
            "liked": [int(k * 5 % 11 < 4) for k in rows],
        }
    ).write_csv(tmp_path / "orders.csv")
    return str(tmp_path / "orders.csv")


def test_a_log_becomes_tables_with_a_schema(path):
    source = OwnTable(
        path, labels=["bought", "liked"], user="reader", time="day", drop=["minutes_read"]
    )
    tables = source.read()
    assert tables.name == "orders"
    assert [len(tables.part(p)) for p in ("train", "validation", "test")] == [96, 12, 12]
    assert tables.test["day"].unique().to_list() == ["2024-01-10"]
    assert tables.schema.features == ("reader", "book_id", "age", "day", "price")
    assert tables.schema.sparse[-1] == Sparse("weekday of day", column="day", part="weekday")
    assert (tables.schema.sparse[0].side, tables.notes[0]) == ("user", "split by time")
    assert "minutes_read: left out, as told" in tables.notes
    data = TableDataModule(tables, batch_size=32)
    data.setup("fit")
    assert len(next(iter(data.train_dataloader()))) == 32


def test_users_stay_together_without_time(path):
    tables = OwnTable(path, labels={"bought": "sale"}, user="reader", test=0.3).read()
    readers = [set(tables.part(p)["reader"]) for p in ("train", "validation", "test")]
    assert (sum(map(len, readers)), tables.schema.categories) == (12, ("sale",))


def test_a_separate_test_table(path, tmp_path):
    pl.read_csv(path)[:5].write_parquet(tmp_path / "later.parquet")
    later = str(tmp_path / "later.parquet")
    tables = OwnTable(path, labels=["bought"], time="day", test_path=later).read()
    assert (len(tables.test), len(tables.train) + len(tables.validation)) == (5, ROWS)


def test_a_written_schema(path):
    schema = FeatureSchema(tasks=(Task("bought"),), sparse=(Sparse("book_id"),), user="reader")
    tables = OwnTable(path, schema=schema.to_dict()).read()
    assert (tables.schema, tables.notes) == (schema, ("split by user",))


TWICE = {"tasks": [{"name": "bought"}], "sparse": [{"name": "bought"}]}
ABSENT = FeatureSchema(tasks=(Task("bought"),), sparse=(Sparse("book_id"),), user="client")


@pytest.mark.parametrize(
    ("error", "words", "given"),
    [
        (ValueError, "name the labels", {}),
        (ValueError, "bought are both label and feature", {"schema": TWICE}),
        (ValueError, "split is 'month'", {"labels": ["bought"], "split": "month"}),
        (GatesError, "a split by time needs the column", {"labels": ["bought"], "split": "time"}),
        (GatesError, "all labels are numbers, as 'age': name one with 0", {"labels": ["age"]}),
        (GatesError, r"orders\.csv: the table lacks 'sold'", {"labels": ["sold"]}),
        (
            GatesError,
            "the table lacks 'client'",
            {"labels": ["bought"], "user": "client", "split": "row"},
        ),
        (GatesError, r"orders\.csv lacks the column 'client'", {"schema": ABSENT.to_dict()}),
    ],
)
def test_faults(path, error, words, given):
    with pytest.raises(error, match=words):
        OwnTable(path, **given).read()


def test_a_split_without_training_rows_says_why(path, tmp_path):
    table = pl.read_csv(path).with_columns(day=pl.lit("2024-01-01"))
    table.write_parquet(tmp_path / "oneday.parquet")
    source = OwnTable(str(tmp_path / "oneday.parquet"), ["bought"], user="reader", time="day")
    words = (
        r"oneday\.parquet: a split by time leaves no row to train on, it has 120 rows and 1 values "
        "of 'day': split it by user or row"
    )
    with pytest.raises(GatesError, match=words):
        source.read()
    table.with_columns(reader=pl.lit("r0")).head(1).write_parquet(tmp_path / "one.parquet")
    sizes = {"test": 0.5, "validation": 0.49}
    for user in ("", "reader"):
        with pytest.raises(GatesError, match="leaves no row to train on, it has 1 rows"):
            OwnTable(str(tmp_path / "one.parquet"), ["bought"], user=user, **sizes).read()


def test_labels_may_be_the_words_true_and_false(path, tmp_path):
    table = pl.read_csv(path)
    words = table.with_columns(
        bought=pl.when(pl.col("bought") == 1).then(pl.lit("true")).otherwise(pl.lit("False"))
    )
    words.write_parquet(tmp_path / "words.parquet")
    source = OwnTable(str(tmp_path / "words.parquet"), ["bought"], user="reader", time="day")
    data = TableDataModule(source)
    rows = data.table("train").join(table, on=table.columns[:6], how="left", maintain_order="left")
    assert data.batch("train").labels[:, 0].tolist() == rows["bought_right"].to_list()
    assert data.digest()


@pytest.mark.fault("video V26")
@pytest.mark.parametrize(
    ("days", "note"),
    [
        (["2024-01-09", "2024-01-10"], "1 of 2 test rows are not later than all training and"),
        (["2023-12-31", "2023-12-31"], "2 of 2 test rows are not later than all training and"),
        (["2024-01-10", "2024-02-01"], None),
        ([20240110, 20240201], "'day' holds other numbers in the test rows, text in all others"),
        ([1_704_073_824, 1_704_160_224], "'day' holds seconds in the test rows, text in all"),
    ],
)
def test_another_table_of_test_rows_that_are_not_later_is_noted(path, tmp_path, days, note):
    log = pl.read_csv(path)
    log.filter(pl.col("day") < "2024-01-10").write_csv(tmp_path / "early.csv")
    pl.concat([log[:2].drop("day"), pl.DataFrame({"day": days})], how="horizontal").write_csv(
        tmp_path / "late.csv"
    )
    places = str(tmp_path / "early.csv"), str(tmp_path / "late.csv")
    source = OwnTable(places[0], labels=["bought"], time="day", test_path=places[1])
    noted = [one for one in source.read().notes if "test rows" in one]
    assert len(noted) == (note is not None)
    assert all(one.startswith(note) for one in noted)


def sizes(tables):
    return [len(tables.train), len(tables.validation), len(tables.test)]


def test_census(shared):
    path = shared("census_income_kdd_test.parquet")
    tables = Census(str(path)).read()
    assert sum(sizes(tables)) == 99_762
    assert np.array(sizes(tables)) / 99_762 == pytest.approx([0.7, 0.1, 0.2], abs=0.005)
    everything = pl.concat([tables.train, tables.validation, tables.test])
    assert (everything["income_50k"].sum(), everything["never_married"].sum()) == (6186, 43_143)
    features = set(tables.schema.features)
    assert not features & {"marital_stat", "instance_weight", "income_50k", "never_married"}
    assert len(features) == 39
    (leak,) = find_leaks(tables.train, tables.schema)  # a part of the published benchmark
    assert (leak.column, leak.task) == ("det_hh_fam_stat", "never_married")
    assert 0.97 < leak.auc < 0.98
    assert Census(str(path)).read().test.equals(tables.test)
    data = TableDataModule(tables)
    data.setup("fit")
    assert data.batch("validation").labels.mean(0).tolist() == pytest.approx(
        [0.062, 0.432], abs=0.02
    )
    assert (data.batch("validation").sparse == 0).float().mean() < 1e-3


def test_census_of_another_kind_is_refused(shared, tmp_path):
    table = pl.read_parquet(shared("census_income_kdd_test.parquet"), n_rows=50)
    table.drop("age").write_parquet(tmp_path / "a.parquet")
    with pytest.raises(GatesError, match="lacks the column 'age'"):
        Census(str(tmp_path / "a.parquet")).read()
    table.with_columns(income_50k=pl.lit(">50K")).write_parquet(tmp_path / "b.parquet")
    with pytest.raises(GatesError, match=r"column 'income_50k' has '>50K', expected '- 5"):
        Census(str(tmp_path / "b.parquet")).read()


@pytest.mark.fault("video V19")
def test_a_marital_status_is_a_word(tmp_path):
    columns = dict.fromkeys(NUMBERS, [1] * 60)
    columns |= {"income_50k": ["- 50000.", "50000+."] * 30, "marital_stat": [4, 5] * 30}
    table = pl.DataFrame(columns)
    table.write_parquet(tmp_path / "numbers.parquet")
    with pytest.raises(GatesError, match="'marital_stat' holds Int64, expected words, such as 'N"):
        Census(str(tmp_path / "numbers.parquet")).read()
    words = pl.Series("marital_stat", ["Never married", " Widowed"] * 30, pl.Categorical)
    table.with_columns(words).write_parquet(tmp_path / "words.parquet")
    read = Census(str(tmp_path / "words.parquet")).read()
    never = pl.concat([read.train, read.validation, read.test])["never_married"]
    assert sorted(never.to_list()) == [0] * 30 + [1] * 30


def test_movielens(shared):
    tables = MovieLens(str(shared("movielens1m_watch_rating.parquet"))).read()
    assert (sum(sizes(tables)), len(tables.test)) == (424_894, 199_950)
    assert len(tables.validation) / 224_944 == pytest.approx(0.1, abs=0.005)
    data = TableDataModule(tables)
    data.setup("test")
    batch = data.batch("test")
    assert (batch.mask[:, 1] == (batch.labels[:, 0] == 1)).all()
    assert batch.mask[:, 0].all()
    rating = tables.test["rating"].to_numpy()
    assert (batch.labels[:, 1].numpy() == (rating >= 4)).all()
    assert tables.schema.features == ("user_id", "movie_id")


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("rating", 7, r"row 0, column 'rating': it is 7, expected 1 to 5"),
        ("has_watched", 0, "expected 1 to 5 where watched and 0 elsewhere"),
        ("comet_part", "val", "has no rows of comet_part 'test'"),
    ],
)
def test_faulty_ratings_are_refused(column, value, words, tmp_path):
    table = pl.DataFrame(
        {
            "user_id": [1, 1],
            "movie_id": [1, 2],
            "rating": [3, 0],
            "has_watched": [1, 0],
            "comet_part": ["val", "test"],
        }
    ).with_columns(pl.lit(value).alias(column))
    table.write_parquet(tmp_path / "m.parquet")
    with pytest.raises(GatesError, match=words):
        MovieLens(str(tmp_path / "m.parquet")).read()


def test_open_bandit(shared):
    path = str(shared("open_bandit_all.parquet"))
    tables = OpenBandit(path).read()
    assert sizes(tables) == [14_000, 2_000, 4_000]
    assert tables.train["time_ms"].max() < tables.validation["time_ms"].min()
    assert tables.validation["time_ms"].max() < tables.test["time_ms"].min()
    random = OpenBandit(path, policy="random").log()
    assert len(random) == 10_000
    assert (random["propensity_score"] == 1 / 80).all()
    assert "propensity_score" not in tables.schema.features
    assert random["time_ms"].min() == 1574553634762


def log(**columns):
    return pl.DataFrame(
        {
            "timestamp": ["2019-11-24 00:00:34.762830+00:00"] * 3,
            "item_id": [1, 2, 3],
            "position": [1, 2, 3],
            "click": [0, 1, 0],
            "propensity_score": [0.5, 0.5, 0.5],
            **{f"user_feature_{k}": ["a", "b", "c"] for k in range(4)},
            **columns,
        }
    )


@pytest.mark.parametrize(
    ("columns", "policy", "words"),
    [
        (
            {"timestamp": ["2019-11-24 00:00:34.762830+00:00", "x", "y"]},
            "all",
            "row 1, column 'tim",
        ),
        (
            {"propensity_score": [0.5, 0.0, 1.0]},
            "all",
            r"row 1, column 'propensity_score': it is 0",
        ),
        (
            {"propensity_score": [0.5, 1.0, 1.5]},
            "all",
            r"row 2, column 'propensity_score': it is 1",
        ),
        ({}, "bts", "has no column 'policy'"),
        ({"policy": ["random"] * 3}, "bts", "has no row of policy bts"),
    ],
)
def test_faulty_bandit_logs_are_refused(columns, policy, words, tmp_path):
    log(**columns).write_parquet(tmp_path / "b.parquet")
    with pytest.raises(GatesError, match=words):
        OpenBandit(str(tmp_path / "b.parquet"), policy=policy).log()


@pytest.fixture
def country(tmp_path):
    """A folder in the layout of MTReclib, with a category that training lacks."""

    def write(name, rows, first):
        draw = np.random.default_rng(first)
        columns = {"": np.arange(rows)}
        columns |= {f"c{k}": draw.integers(0, 5 + first, rows) for k in range(16)}
        columns |= {f"n{k}": draw.normal(size=rows).round(3) for k in range(3)}
        columns |= {"label1": draw.integers(0, 2, rows), "label2": np.zeros(rows, int)}
        pl.DataFrame(columns).write_csv(tmp_path / name)

    write("train.csv", 200, 0)
    write("test.csv", 50, 4)
    return tmp_path


def test_aliexpress(country):
    tables = AliExpress(str(country)).read()
    assert (len(tables.train) + len(tables.validation), len(tables.test)) == (200, 50)
    assert [f.name for f in tables.schema.sparse] == [f"c{k}" for k in range(16)]
    assert [f.name for f in tables.schema.dense] == ["n0", "n1", "n2"]
    assert tables.schema.task_names == ("click", "conversion")
    data = TableDataModule(tables)
    data.setup("test")
    assert (data.batch("test").sparse == 0).any()


def test_aliexpress_with_a_named_index(country):
    for name in ("train", "test"):
        table = pl.read_csv(country / f"{name}.csv")
        table.rename({"": "index"}).write_csv(country / f"{name}.csv")
    assert AliExpress(str(country)).read().schema.sparse[0].name == "c0"


def test_faulty_countries_are_refused(country):
    test = pl.read_csv(country / "test.csv")
    test.rename({"c0": "d0"}).write_csv(country / "test.csv")
    with pytest.raises(GatesError, match="take both from one download"):
        AliExpress(str(country)).read()
    test.select("c0", "c1", "label1").write_csv(country / "test.csv")
    with pytest.raises(GatesError, match="has 3 columns besides its index"):
        AliExpress(str(country)).read()
    (country / "test.csv").unlink()
    with pytest.raises(GatesError, match=r"lacks test\.csv: name the folder of a country"):
        AliExpress(str(country)).read()
