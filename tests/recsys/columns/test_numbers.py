import datetime
import pickle

import numpy as np
import polars as pl
import pytest

from core_gates.errors import GatesError
from recsys.columns.canonical import RowError, numbers_of

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


def test_words_for_true_and_false_are_one_and_zero():
    found = numbers_of(pl.Series("y", ["true", "False", None, "1", "0.5"]))
    np.testing.assert_array_equal(found, [1, 0, np.nan, 1, 0.5])
    with pytest.raises(RowError, match="row 1, column 'y': 'yes' is no number"):
        numbers_of(pl.Series("y", ["true", "yes"]))
