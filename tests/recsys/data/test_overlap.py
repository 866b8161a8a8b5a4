"""Test rows that are training rows are refused if most are, and counted otherwise."""

import polars as pl
import pytest

from core_gates.errors import GatesError
from recsys.data.datamodule import TableDataModule
from recsys.data.readers.own_table import OwnTable
from recsys.data.tables import RankingTables, refuse_seen_rows
from recsys.schema import FeatureSchema, History, Sparse, Task


@pytest.mark.fault("video H4")
def test_test_rows_that_are_known_are_refused_in_any_order_and_type(tables):
    shuffled = tables.train.sample(fraction=1.0, shuffle=True, seed=1)
    for test in (tables.train, shuffled, shuffled[:20], tables.validation,
                 shuffled.cast({"user": pl.Int32, "y": pl.Float64})):  # fmt: skip
        with pytest.raises(GatesError, match="test rows equal training or validation rows, so"):
            TableDataModule(tables._replace(test=test)).setup("fit")


@pytest.mark.fault("video H4")
def test_a_few_known_test_rows_are_counted(tables):
    test = pl.concat([tables.test, tables.train[:5], tables.validation[:3]])
    data = TableDataModule(tables._replace(test=test))
    assert data.notes == ("8 of 25 test rows equal training or validation rows",)
    assert data.digest() == TableDataModule(tables._replace(test=test, notes=("a",))).digest()
    changed = test.with_columns(place=pl.col("place") + 0.5)
    assert TableDataModule(tables._replace(test=changed)).notes == ()


@pytest.mark.fault("video H4")
def test_rows_of_few_values_are_equal_without_being_known():
    schema = FeatureSchema((Task("y"),), (Sparse("c"),), sequences=(History("h", of="c"),))

    def rows(count):
        values = [number % 5 for number in range(count)]
        return pl.DataFrame({"c": values, "h": [[v, v] for v in values], "y": [0] * count})

    found = refuse_seen_rows(RankingTables("few", schema, rows(50), rows(20), rows(30)))
    assert found == (
        "30 of 30 test rows equal training or validation rows, as 100% of the training rows equal "
        "others",
    )


@pytest.mark.fault("video H4")
def test_a_table_is_not_tested_on_itself(tables, tmp_path):
    path, link = tmp_path / "log.parquet", tmp_path / "link.parquet"
    tables.train.with_columns(user=pl.lit(1), item=pl.lit(2), place=pl.lit(3)).write_parquet(path)
    link.symlink_to(path)
    for test in (path, link, tmp_path):
        with pytest.raises(GatesError, match="is tested on itself"):
            OwnTable(str(path), ["y"], test_path=str(test)).read()
