import os
from itertools import combinations
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from core_gates.errors import GatesError
from recsys.data.leaks import chance_error
from recsys.data.readers import OpenBandit
from recsys.experiments.claims import (
    DISTANCE,
    Chance,
    action_probabilities,
    chance_bars,
    chance_rows,
    chances,
    cross_bars,
    cross_estimates,
    cross_rows,
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


RATES = np.array([0.1, 0.2, 0.6])
GREEDY = np.array([0.1, 0.2, 0.7])


def log(probabilities, seed, rows=6_000):
    """A log of three items at one position, of a policy that does not change."""
    rng = np.random.default_rng(seed)
    item = rng.choice(3, rows, p=probabilities)
    return pl.DataFrame(
        {
            "item_id": item,
            "position": np.ones(rows, dtype=np.int64),
            "click": (rng.random(rows) < RATES[item]).astype(int),
            "propensity_score": probabilities[item],
        }
    )


def test_each_policy_is_estimated_from_the_log_of_the_other():
    found = cross_estimates({"even": log(np.full(3, 1 / 3), 0), "greedy": log(GREEDY, 1)})
    assert [(one.policy, one.log) for one in found] == [("even", "greedy"), ("greedy", "even")]
    for one, truth in zip(found, (RATES.mean(), RATES @ GREEDY), strict=True):
        assert one.estimate.low < truth < one.estimate.high
        assert one.estimate.high - one.estimate.low < 0.08
        assert one.gap == 0
    expected = 1 / (np.square(1 / 3) / GREEDY).sum()  # of the greedy log's rows
    assert found[0].effective / 6_000 == pytest.approx(expected, rel=0.05)
    assert all(bar.met for bar in cross_bars(found))


def test_logs_without_the_weights_miss():
    """If the greedy policy had recorded even probabilities, its mean would be taken for theirs."""
    even, greedy = log(np.full(3, 1 / 3), 0), log(GREEDY, 1)
    wrong = greedy.with_columns(propensity_score=pl.lit(1 / 3))
    found = cross_estimates({"even": even, "greedy": wrong})
    assert [bar.met for bar in cross_bars(found)] == [False, False]
    assert found[0].gap == pytest.approx(found[0].estimate.low - even["click"].mean())


def test_a_policy_that_learns_is_known_by_its_frequencies():
    learning = pl.DataFrame(
        {"item_id": [0, 0, 1, 1, 1, 2], "position": [1, 1, 1, 1, 2, 2],
         "click": [0] * 6, "propensity_score": [0.9, 0.1, 0.2, 0.8, 0.5, 0.5]}
    )  # fmt: skip
    shown = pl.DataFrame({"item_id": [0, 1, 1, 2, 7], "position": [1, 1, 2, 1, 2]})
    np.testing.assert_allclose(action_probabilities(learning, shown), [0.5, 0.5, 0.5, 0, 0])
    uniform = learning.with_columns(propensity_score=pl.lit(0.25))
    np.testing.assert_array_equal(action_probabilities(uniform, shown), np.full(5, 0.25))


def test_logs_that_lack_something_are_refused():
    even = log(np.full(3, 1 / 3), 0, rows=5)
    with pytest.raises(GatesError, match="the log of policy b lacks the column 'click'"):
        cross_estimates({"a": even, "b": even.drop("click")})
    with pytest.raises(GatesError, match="the log of policy b has no row"):
        cross_estimates({"a": even, "b": even.clear()})


def test_real_policies():
    """Open Bandit: the click rates of both lie in the intervals from the other's log."""
    root = Path(os.environ.get("GATES_SHARED", Path(__file__).parents[4] / "shared"))
    path = root / "data" / "recsys" / "open_bandit_all.parquet"
    if not path.is_file():
        pytest.skip(f"{path} is absent: set GATES_SHARED")
    found = cross_estimates({p: OpenBandit(str(path), p).log() for p in ("random", "bts")})
    assert [one.own.value for one in found] == [0.0038, 0.0042]
    assert [one.gap for one in found] == [0.0, 0.0]
    assert [one.effective for one in found] == pytest.approx([340.4, 2638.9], abs=0.1)
    rows = {(row.method, row.metric): row.value for row in cross_rows(found, group="controls")}
    assert rows["bts in its own log", "click rate"] == 0.0042
    assert rows["random from the log of bts", "click rate"] == pytest.approx(0.00233, abs=1e-5)
