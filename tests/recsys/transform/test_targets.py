import numpy as np
import polars as pl
import pytest

from recsys.transform.targets import users_of


@pytest.mark.parametrize("values", [["b", "a", "b"], [7, 9, 7], [2**40, 3, 2**40]])
def test_users_are_the_same_in_every_table(values):
    table = pl.DataFrame({"u": values})
    found = users_of(table, "u")
    assert found[0] == found[2] != found[1]
    assert (found >= 0).all()
    assert (users_of(table[1:], "u") == found[1:]).all()


def test_without_users_each_row_is_its_own():
    table = pl.DataFrame({"x": [1, 1, 1]})
    assert users_of(table, "", first_row=10).tolist() == [10, 11, 12]
    assert users_of(table, "absent").tolist() == [0, 1, 2]


def test_missing_users():
    table = pl.DataFrame({"u": [3, None, -1]})
    assert users_of(table, "u").tolist() == [3, -1, -1]
    assert users_of(table.with_columns(u=pl.lit("")), "u").tolist() == [-1, -1, -1]
    assert users_of(table.with_columns(u=pl.lit(None)), "u").dtype == np.int64
