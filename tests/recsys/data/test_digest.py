import datetime

import polars as pl
import pytest

from recsys.data.digest import table_digest

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


@pytest.mark.parametrize("case", CHANGES)
def test_every_change_is_seen(case):
    assert table_digest(CHANGES[case]) != table_digest(TABLE)


def test_it_never_changes():
    assert table_digest(TABLE) == table_digest(TABLE.clone())
    assert table_digest(TABLE)[:16] == "ce575dbb13fed796"
