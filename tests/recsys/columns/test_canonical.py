import datetime

import polars as pl
import pytest

from core_gates.errors import GatesError
from recsys.columns.canonical import MISSING, UNREADABLE, canonical, kind_of

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


def test_words_for_true_and_false_are_one_and_zero():
    words = pl.Series("b", ["true", "False", "TRUE", "truth", None, "1", ""])
    assert canonical(words, "integer").to_list() == [1, 0, 1, UNREADABLE, -1, 1, -1]
    assert canonical(pl.Series("b", [True, False, None]), "integer").to_list() == [1, 0, -1]
