import datetime

import polars as pl
import pytest

from recsys.data.tables import table_digest

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


@pytest.mark.fault("video V18")
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([[1, None, 2], [3]], [[1, 2, None], [3]]),
        ([[None], []], [[], [None]]),
        ([["a", None], ["b"]], [["a"], [None, "b"]]),
    ],
)
def test_nulls_in_lists_have_places(one, other):
    tables = [pl.DataFrame({"a": pl.Series(rows)}) for rows in (one, other)]
    assert table_digest(tables[0]) != table_digest(tables[1])


@pytest.mark.fault("video V18")
def test_integers_beyond_63_bits_are_told_apart_and_smaller_ones_stay():
    def digest(*values):
        return table_digest(pl.DataFrame({"a": pl.Series(values, dtype=pl.UInt64)}))

    found = [digest(value) for value in (0, 2**63, 2**63 + 5, 2**64 - 1, None)]
    assert len(set(found)) == 5
    assert digest(7, 2**62, None, 2**63 - 1)[:16] == "a19cf32d932ab501"


def test_digests_of_lists_without_nulls_stay():
    table = pl.DataFrame({"a": [[1, 2], None, [], [3]], "b": [["x"], [], None, ["", "y"]]})
    assert table_digest(table)[:16] == "341be2777d44b423"


@pytest.mark.parametrize("case", CHANGES)
def test_every_change_is_seen(case):
    assert table_digest(CHANGES[case]) != table_digest(TABLE)


def test_it_never_changes():
    assert table_digest(TABLE) == table_digest(TABLE.clone())
    assert table_digest(TABLE)[:16] == "ce575dbb13fed796"
