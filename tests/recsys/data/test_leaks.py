import numpy as np
import polars as pl
import pytest
from sklearn.metrics import roc_auc_score

from core_gates.errors import GatesError
from recsys.data.leaks import chance_error, find_leaks, permute_labels, repeated_rows
from recsys.schema import Dense, FeatureSchema, Sparse, Task

N = 4000


def table(draw, n=N):
    y = (draw.random(n) < 0.3).astype(int)
    return pl.DataFrame(
        {
            "x": draw.normal(size=n),
            "leak": y + 0.01 * draw.normal(size=n),
            "shop": np.where(y, "a", "b"),
            "u": draw.integers(0, 50, n),
            "y": y,
            "z": (draw.random(n) < 0.5).astype(int),
        }
    )


SCHEMA = FeatureSchema(
    tasks=(Task("y"), Task("z")),
    sparse=(Sparse("u"), Sparse("shop")),
    dense=(Dense("x"), Dense("leak")),
)


def test_leaks_are_named():
    found = find_leaks(table(np.random.default_rng(6)), SCHEMA)
    assert {(leak.column, leak.task) for leak in found} == {("leak", "y"), ("shop", "y")}
    assert found[0].auc == pytest.approx(1.0)
    assert any(str(leak).startswith("column 'leak' alone predicts 'y'") for leak in found)


def test_permuted_labels_are_predicted_by_nothing():
    before = table(np.random.default_rng(7))
    after = permute_labels(before, SCHEMA, seed=3)
    assert after.drop("y", "z").equals(before.drop("y", "z"))
    assert after["y"].sum() == before["y"].sum()
    pairs = [t.group_by("y", "z").len().sort("y", "z") for t in (before, after)]
    assert pairs[0].equals(pairs[1])
    assert find_leaks(after, SCHEMA) == []
    positives = int(after["y"].sum())
    error = chance_error(positives, N - positives)
    found = roc_auc_score(after["y"], after["leak"])
    assert abs(found - 0.5) < 3 * error
    assert roc_auc_score(before["y"], before["leak"]) - 0.5 > 30 * error


def test_columns_that_follow_the_label_are_permuted_with_it():
    before = table(np.random.default_rng(8))
    after = permute_labels(before, SCHEMA, also=["leak"])
    assert np.corrcoef(after["leak"], after["y"])[0, 1] > 0.99
    assert abs(np.corrcoef(after["leak"], before["leak"])[0, 1]) < 0.1


def test_the_error_of_chance_is_that_of_random_scores():
    draw = np.random.default_rng(9)
    labels = np.repeat([1, 0], [40, 160])
    areas = [roc_auc_score(labels, draw.random(200)) for _ in range(400)]
    assert np.std(areas) == pytest.approx(chance_error(40, 160), rel=0.12)
    assert np.isnan(chance_error(0, 10))


def test_repeated_rows():
    train = pl.DataFrame({"u": [1, 1, 2, None], "v": [1, 2, 1, 1], "t": [5, 5, 5, 5]})
    test = pl.DataFrame({"u": [1, 2, 2], "v": [1, 1, 1], "t": [5, 5, 6]})
    assert repeated_rows(train, test, ["u", "v", "t"]) == 2
    assert repeated_rows(train, test, ["u", "v"]) == 3
    with pytest.raises(GatesError, match="lacks the column 'w'"):
        repeated_rows(train, test, ["u", "w"])
    with pytest.raises(GatesError, match="no columns are named"):
        repeated_rows(train, test, [])
