import os
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from core_gates.errors import GatesError
from recsys.data.readers import OpenBandit
from recsys.experiments.other_policy import (
    action_probabilities,
    cross_bars,
    cross_estimates,
    cross_rows,
)

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
