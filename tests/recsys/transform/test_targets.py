import numpy as np
import polars as pl
import pytest

from recsys.columns.canonical import RowError
from recsys.metrics import gauc, summed_log_loss, user_resamples
from recsys.schema import FeatureSchema, Task
from recsys.transform.targets import read_targets, users_of


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


@pytest.mark.fault("video R1")
def test_each_row_without_a_user_is_its_own():
    table = pl.DataFrame({"u": [3, None, -1]})
    assert users_of(table, "u").tolist() == [3, -2, -3]
    assert users_of(table, "u", first_row=10).tolist() == [3, -12, -13]
    assert users_of(table.with_columns(u=pl.lit("")), "u").tolist() == [-1, -2, -3]
    assert users_of(table.with_columns(u=pl.Series([0.0, np.nan, 0.0])), "u").tolist() == [0, -2, 0]
    assert users_of(table.with_columns(u=pl.lit(None)), "u").dtype == np.int64


@pytest.mark.fault("video R1")
def test_visitors_who_are_not_logged_in_are_no_user_of_many_rows():
    """A score that orders no two rows of a user has GAUC ½; intervals count each visitor."""
    rng = np.random.default_rng(0)
    rate = np.concatenate([np.repeat(rng.random(30), 10), rng.random(150)])
    labels = (rng.random(450) < rate).astype(float)
    known = np.repeat(np.arange(30), 10).tolist()
    users = users_of(pl.DataFrame({"u": [*known, *[None] * 150]}), "u")
    found = gauc(rate, labels, users)
    assert found.weighted == found.mean == 0.5
    assert found.users + found.excluded == 180
    draws = user_resamples(users, resamples=10)
    score = summed_log_loss(labels[:, None], rate[:, None], users)
    assert draws.intervals(score)["log_loss"].units == 180


@pytest.mark.fault("video R15")
@pytest.mark.parametrize(
    ("values", "row"), [([1.0, 2.5, 3.5], 1), (np.array([1, 2, 2**63], np.uint64), 2)]
)
def test_numbers_that_would_be_one_user_are_refused(values, row):
    table = pl.DataFrame({"u": values})
    with pytest.raises(RowError, match=f"row {row}, column 'u': .* is no whole number below 2"):
        users_of(table, "u")
    assert users_of(table[:row], "u").tolist() == list(range(1, row + 1))
    schema = FeatureSchema(tasks=(Task("y"),), user="u")  # scoring asks for no user
    assert len(read_targets(table, schema, labels=False).user) == 3
