import polars as pl
import pytest

from core_gates.errors import GatesError
from recsys.data.datamodule import TableDataModule
from recsys.data.readers import OwnTable
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
    assert tables.schema.features == ("reader", "book_id", "age", "price")
    assert tables.schema.sparse[0].side == "user"
    assert tables.notes[0] == "split by time"
    assert "minutes_read: left out, as told" in tables.notes
    data = TableDataModule(tables, batch_size=32)
    data.setup("fit")
    assert len(next(iter(data.train_dataloader()))) == 32


def test_users_stay_together_without_time(path):
    tables = OwnTable(path, labels={"bought": "sale"}, user="reader", test=0.3).read()
    readers = [set(tables.part(p)["reader"]) for p in ("train", "validation", "test")]
    assert sum(map(len, readers)) == 12
    assert tables.schema.categories == ("sale",)


def test_a_separate_test_table(path, tmp_path):
    pl.read_csv(path)[:5].write_parquet(tmp_path / "later.parquet")
    later = str(tmp_path / "later.parquet")
    tables = OwnTable(path, labels=["bought"], time="day", test_path=later).read()
    assert len(tables.test) == 5
    assert len(tables.train) + len(tables.validation) == ROWS


def test_a_written_schema(path):
    schema = FeatureSchema(tasks=(Task("bought"),), sparse=(Sparse("book_id"),), user="reader")
    tables = OwnTable(path, schema=schema.to_dict()).read()
    assert tables.schema == schema
    assert tables.notes == ("split by user",)


def test_faults(path):
    with pytest.raises(ValueError, match="name the labels"):
        OwnTable(path)
    both = {"tasks": [{"name": "bought"}], "sparse": [{"name": "bought"}]}
    with pytest.raises(ValueError, match="bought are both label and feature"):
        OwnTable(path, schema=both)
    with pytest.raises(ValueError, match="split is 'month'"):
        OwnTable(path, labels=["bought"], split="month")
    with pytest.raises(GatesError, match="a split by time needs the column of the time"):
        OwnTable(path, labels=["bought"], split="time").read()
    with pytest.raises(GatesError, match=r"orders\.csv, line 2, column 'age': it is 30, a label"):
        OwnTable(path, labels=["age"]).read()
    with pytest.raises(GatesError, match=r"orders\.csv: the table lacks 'sold'"):
        OwnTable(path, labels=["sold"]).read()
    with pytest.raises(GatesError, match="the table lacks 'client'"):
        OwnTable(path, labels=["bought"], user="client", split="row").read()
    bad = FeatureSchema(tasks=(Task("bought"),), sparse=(Sparse("book_id"),), user="client")
    with pytest.raises(GatesError, match=r"orders\.csv lacks the column 'client'"):
        OwnTable(path, schema=bad.to_dict()).read()


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
    for user in ("", "reader"):
        for size in ({"test": 0.5, "validation": 0.49},):
            one = OwnTable(str(tmp_path / "one.parquet"), ["bought"], user=user, **size)
            with pytest.raises(GatesError, match="leaves no row to train on, it has 1 rows"):
                one.read()


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
        ([20240110, 20240201], "'day' has type Int64 in the test rows, String in all others"),
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
