import numpy as np
import polars as pl
import pytest
import torch

from recsys.data.tables import RankingTables
from recsys.experiments.slices import slice_rows, slices_of
from recsys.metrics import summed_log_loss
from recsys.schema import FeatureSchema, Sparse, Task

SCHEMA = FeatureSchema(
    tasks=(Task("y"), Task("z")), sparse=(Sparse("u"), Sparse("v")), user="u", item="v"
)


def tables(train, test, schema=SCHEMA, **columns):
    parts = [pl.DataFrame({"u": u, "v": v}) for u, v in (train, test)]
    parts[1] = parts[1].with_columns(**{n: pl.Series(values) for n, values in columns.items()})
    return RankingTables("rows", schema, parts[0], parts[0].clear(), parts[1])


def test_splits_are_cut_one_by_one_and_joined():
    """User a is new in the first split alone; the column of random rows exists in both."""
    first = tables((["b", "b"], [1, 2]), (["a", "b"], [1, 3]), shown=[1, 0])
    second = tables((["a", "b"], [1, 3]), (["a", "b", None], [1, 4, 3]), shown=[0, 0, None])
    found = slices_of([first, second], random="shown")
    assert found["new users"].tolist() == [True, False, False, False, True]
    assert found["new items"].tolist() == [False, True, False, True, False]
    assert found["random exposure"].tolist() == [True, False, False, False, False]
    assert found["known users"].tolist() == [False, True, True, True, False]


@pytest.mark.fault("video R1")
@pytest.mark.parametrize("nobody", [None, ""], ids=repr)
def test_a_row_without_a_user_is_of_no_known_user(nobody):
    one = tables((["a", nobody, nobody], [1, None, 2]), (["a", nobody, "b"], [None, 1, 2]))
    found = slices_of([one])
    assert found["new users"].tolist() == [False, True, True]
    assert found["new items"].tolist() == [True, False, False]


def test_rows_without_user_or_item_have_no_parts():
    schema = FeatureSchema(tasks=SCHEMA.tasks, sparse=SCHEMA.sparse, user="u")
    assert slices_of([tables((["a"], [1]), (["a"], [1]), schema)]) == {}
    plain = slices_of([tables((["a"], [1]), (["a"], [1]))], random="shown")
    assert "random exposure" not in plain
    assert plain["known users"].all()


@pytest.fixture
def rows(rows_of):
    rng = np.random.default_rng(4)
    labels = rng.random((300, 2)) < 0.3
    mask = torch.from_numpy(rng.random((300, 2)) < 0.9)
    weight = torch.from_numpy(rng.random(300).astype(np.float32))
    user = torch.from_numpy(rng.integers(0, 30, 300))
    return rows_of(labels, mask=mask, weight=weight, user=user)


def test_losses_are_those_of_the_rows_alone(rows):
    rng = np.random.default_rng(5)
    found = {"home": [rng.random((300, 2)), rng.random((300, 2))], "mmoe": [rng.random((300, 2))]}
    part = rng.random(300) < 0.4
    made = slice_rows(rows, {"new users": part}, found, reference="home", resamples=50)
    by = {(row.method, row.versus): row for row in made}
    few = rows.take(torch.from_numpy(part))
    users = len(np.unique(few.user.numpy()))

    def alone(one):
        score = summed_log_loss(
            few.labels.numpy(),
            one[part],
            few.user.numpy(),
            mask=few.mask.numpy(),
            weights=few.weight.numpy(),
        )
        return score(np.ones((1, users)))["log_loss"][0]

    expected = {m: np.mean([alone(one) for one in own]) for m, own in found.items()}
    for method, value in expected.items():
        row = by[method, ""]
        assert row.metric == "log-loss, new users"
        assert row.value == pytest.approx(value, rel=1e-6)
        assert row.low < row.value < row.high
    gap = by["mmoe", "home"]
    assert gap.value == pytest.approx(expected["mmoe"] - expected["home"], rel=1e-5)
    assert (by["test rows", ""].value, by["test rows", ""].n) == (part.sum(), users)


def test_a_task_that_counts_nowhere_in_a_part_is_left_out(rows):
    mask = rows.mask.clone()
    mask[:20, 1] = False
    part = np.arange(300) < 20
    one = np.full((300, 2), 0.25)
    made = slice_rows(rows.replace(mask=mask), {"a": part}, {"m": [one]}, reference=None)
    assert np.isfinite([made[0].value, made[0].low, made[0].high]).all()


@pytest.mark.fault("video R15")
def test_a_part_of_which_one_user_counts_has_no_interval(rows):
    few = rows.replace(mask=rows.mask & (rows.user == 3)[:, None])
    probs = np.full((300, 2), 0.5)
    (row, _) = slice_rows(few, {"all": np.ones(300, bool)}, {"m": [probs]}, reference=None)
    assert np.isfinite(row.value)
    assert np.isnan(row.low)
    assert row.n == 1
