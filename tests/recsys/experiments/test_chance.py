from itertools import combinations

import numpy as np
import pytest

from recsys.data.leaks import chance_error
from recsys.experiments.chance import (
    DISTANCE,
    Chance,
    chance_bars,
    chance_rows,
    chances,
    permuted_error,
)
from recsys.metrics import auc


@pytest.mark.parametrize(
    "scores", [[1, 2, 3, 4, 5, 6, 7], [1, 1, 1, 2, 3, 3, 4], [0, 0, 1, 1, 1, 1, 1]]
)
@pytest.mark.parametrize("positives", [1, 3])
def test_the_error_is_that_of_all_orders_of_the_labels(scores, positives):
    areas = []
    for chosen in combinations(range(7), positives):
        labels = np.isin(np.arange(7), chosen).astype(int)
        areas.append(auc(scores, labels).value)
    assert np.mean(areas) == pytest.approx(0.5)
    assert permuted_error(scores, labels) == pytest.approx(np.std(areas), rel=1e-12)


def test_scores_of_users_change_nothing_once_labels_are_permuted():
    """Without a permutation, labels and scores that are alike within users vary far more."""
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(20), 50)
    scores = rng.standard_normal(20)[users] + 1e-6 * rng.standard_normal(1000)
    error = permuted_error(scores, users < 10)
    clustered, permuted = [], []
    for _ in range(400):
        labels = rng.permutation(20)[users] < 10
        clustered.append(auc(scores, labels).value)
        permuted.append(auc(scores, rng.permutation(labels)).value)
    assert np.std(permuted) == pytest.approx(error, rel=0.15)
    assert np.std(clustered) > 4 * error


def test_constant_scores_are_at_no_distance_and_missing_classes_at_none(rows_of):
    labels = np.array([[1, 0], [0, 0], [1, 0]])
    rows = rows_of(labels)
    constant, missing = chances(rows, np.full((3, 2), 0.2), ("a", "b"))
    assert (constant.distance, constant.positives) == (0.0, 2)
    assert np.isnan([missing.auc, missing.error, missing.distance]).all()
    assert [bar.name for bar in chance_bars("control", [constant, missing])] == [
        "control: |AUC − 0.5| of a"
    ]


def test_masked_rows_do_not_count(rows_of):
    labels = np.array([[1], [0], [1], [0]])
    mask = np.array([[True], [True], [True], [False]])
    rows = rows_of(labels)
    rows = rows.replace(mask=rows.mask & rows.mask.new_tensor(mask))
    found = chances(rows, np.array([[0.4], [0.3], [0.2], [0.9]]), ("a",))[0]
    assert (found.auc, found.positives) == (0.5, 2)
    assert found.error == pytest.approx(chance_error(2, 1))


def test_bars_hold_what_is_near_chance_or_what_is_far():
    near, far = Chance("a", 0.52, 0.01, 9), Chance("b", 0.54, 0.01, 7)
    assert [bar.met for bar in chance_bars("x", [near, far])] == [True, False]
    assert [bar.met for bar in chance_bars("x", [near, far], ">=")] == [False, True]
    rows = {row.metric: row for row in chance_rows("x", [near, far], group="controls")}
    assert rows[DISTANCE].value == pytest.approx(4.0)
    assert rows["auc, b"].n == 7
    assert (rows["auc, b"].low, rows["auc, b"].high) == pytest.approx((0.5204, 0.5596))
