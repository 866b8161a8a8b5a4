import numpy as np
import polars as pl
import pytest

from core_gates.errors import GatesError
from recsys.data.datamodule import TableDataModule
from recsys.data.leaks import find_leaks
from recsys.data.readers import AliExpress, Census, MovieLens, OpenBandit
from recsys.data.readers.census import NUMBERS


def sizes(tables):
    return [len(tables.train), len(tables.validation), len(tables.test)]


def test_census(shared):
    path = shared("census_income_kdd_test.parquet")
    tables = Census(str(path)).read()
    assert sum(sizes(tables)) == 99_762
    assert np.array(sizes(tables)) / 99_762 == pytest.approx([0.7, 0.1, 0.2], abs=0.005)
    everything = pl.concat([tables.train, tables.validation, tables.test])
    assert everything["income_50k"].sum() == 6186
    assert everything["never_married"].sum() == 43_143
    features = set(tables.schema.features)
    assert not features & {"marital_stat", "instance_weight", "income_50k", "never_married"}
    assert len(features) == 39
    assert find_leaks(tables.train, tables.schema) == []
    again = Census(str(path)).read()
    assert again.test.equals(tables.test)
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
    assert sum(sizes(tables)) == 424_894
    assert len(tables.test) == 199_950
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
    assert len(tables.train) + len(tables.validation) == 200
    assert len(tables.test) == 50
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
