"""Bars of claims: met, missed, and never met by a method that does nothing."""

import math
import os
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch

from core_gates.errors import GatesError
from harness.evidence import Row, compare
from recsys.data.leaks import chance_error
from recsys.data.readers import OpenBandit
from recsys.diagnosis.expert_report import ExpertReport, LayerReport
from recsys.experiments.claims import (
    COLLAPSED,
    DISTANCE,
    HEALTHY,
    Chance,
    Claims,
    action_probabilities,
    chance_bars,
    chance_rows,
    chances,
    claim_bars,
    cross_bars,
    cross_estimates,
    cross_rows,
    fault_bars,
    fault_rows,
    permuted_error,
    report_of,
)
from recsys.experiments.predictions import GAIN, SUMMED, WORSE, gain_rows, scores_of, summary_rows
from recsys.metrics import auc
from recsys.metrics.resampled import user_resamples
from recsys.ranker import Ranker
from recsys.schema import FeatureSchema, Sparse, Task

TASKS = ("view", "like")


def gap(method, low, high, *, task="test", metric=SUMMED, versus="home"):
    return Row(method, task, metric, (low + high) / 2, low, high, 9, versus, 0.01)


def bars(claims, rows, test=None, found=()):
    made = claim_bars(claims, rows, "home", test=test, tasks=TASKS, found=found)
    return {bar.name: bar for bar in made}


@pytest.mark.parametrize(
    ("low", "high", "met"),
    [(0.1, 0.3, True), (-0.01, 0.3, False), (0.0, 0.0, False), (math.nan, math.nan, False)],
)
def test_a_rival_is_beaten_if_the_interval_excludes_zero(low, high, met):
    (bar,) = bars(Claims(beats=("mmoe",)), [gap("mmoe", low, high)]).values()
    assert bar.name == "summed log-loss of mmoe − home, lower end"
    assert bar.met is met


def test_a_rival_with_the_same_predictions_is_not_beaten(rows_of):
    """From predictions to the bar: the difference is exactly 0 in every resample."""
    labels = torch.from_numpy(np.random.default_rng(0).integers(0, 2, (400, 2)))
    test = rows_of(labels, user=torch.arange(400) % 40)
    good = np.where(labels.numpy() == 1, 0.8, 0.3)
    found = {"home": good, "same": good.copy(), "bad": 1 - good, "good": good}
    scores = {m: [scores_of(test, p, TASKS)[""]] for m, p in found.items()}
    renamed = {m: [lambda d, s=s: {SUMMED: s(d)["log_loss"]} for s in own]
               for m, own in scores.items()}  # fmt: skip
    draws = user_resamples(test.user.numpy(), resamples=50)
    rows = compare(renamed, draws, task="test", reference="home")
    assert [bar.met for bar in bars(Claims(beats=("same", "bad")), rows).values()] == [False, True]


def test_no_worse_takes_the_worst_end_in_every_task():
    rows = [gap("trees", -0.02, 0.004, task="view", metric="auc")]
    rows.append(gap("trees", -0.02, 0.03, task="like", metric="auc"))
    view, like = bars(Claims(no_worse={"trees": 0.01}), rows).values()
    assert (view.name, view.value) == ("AUC of home − trees, view, lower end", -0.004)
    assert view.met
    assert not like.met
    assert not any(b.met for b in bars(Claims(no_worse={"trees": 0.01}), []).values())


def test_claims_about_what_was_not_measured_are_missed():
    """A bar that cannot be checked is not left out in silence."""
    claims = Claims(beats=("mmoe",), no_worse={"trees": 0.01}, bounded=True)
    made = bars(claims, [Row("home", "test", SUMMED, 2.0)])
    assert len(made) == 4
    assert all(math.isnan(bar.value) and not bar.met for bar in made.values())


def test_calibration_is_that_of_frequent_tasks_in_every_seed(rows_of):
    count = 9000
    labels = torch.zeros(count, 2)
    labels[:3000, 0], labels[:1500, 1] = 1, 1
    weight, mask = torch.ones(count), torch.ones(count, 2, dtype=torch.bool)
    weight[0], mask[-1000:, 0] = 11, False  # one positive row counts eleven times
    test = rows_of(labels, weight=weight, mask=mask)
    one, two = np.full((count, 2), 0.4), np.full((count, 2), 0.5)
    made = bars(Claims(calibrated=True), [], test, [one, two])
    assert [name.rpartition(", ")[2] for name in made] == [
        "smallest of the seeds", "largest of the seeds",
    ]  # fmt: skip
    low, high = (p * 8010 / 3010 for p in (0.4, 0.5))
    assert [bar.value for bar in made.values()] == pytest.approx([low, high])
    assert [bar.met for bar in made.values()] == [True, False]
    right = np.full((count, 2), 3010 / 8010)
    assert all(bar.met for bar in bars(Claims(calibrated=True), [], test, [right]).values())
    none = bars(Claims(calibrated=True), [], test, [])
    assert len(none) == 2
    assert not any(bar.met for bar in none.values())


@pytest.mark.parametrize(
    ("losses", "met"),
    [
        ({"home": 2.0, "mmoe": 2.1}, True),
        ({"home": 1.8, "mmoe": 2.1}, False),
        ({"home": 2.0, "mmoe": 1.8}, False),
        ({"home": math.nan, "mmoe": 2.1}, False),
        ({"home": 2.0, "mmoe": math.nan}, False),
    ],
)
def test_no_method_is_below_the_oracle(losses, met):
    rows = [Row(m, "test", SUMMED, value) for m, value in (losses | {"oracle": 1.9}).items()]
    rows += [gap("oracle", -9, -8)]
    (bar,) = bars(Claims(bounded=True), rows).values()
    assert bar.met is met


def test_claims_about_strangers_are_refused():
    claims = Claims(beats=("mmoe",), no_worse={"tree": 0.01}, collapsed=("cgc",), healthy=("home",))
    claims.check({"mmoe", "tree", "cgc", "home"})
    for known, stranger in ((["tree", "cgc", "home"], "mmoe"), (["mmoe", "cgc", "home"], "tree")):
        with pytest.raises(GatesError, match=f"claims name {stranger!r}.*; known are .*home"):
            claims.check(known)


def test_means_over_categories_leave_out_differences():
    rows = [
        Row("home", "a", "auc", 0.6), Row("home", "b", "auc", 0.8), Row("home", "c", "auc", 0.5),
        Row("home", "a", "gauc", 0.7), Row("mmoe", "a", "auc", 0.1), Row("home", "a", "ne", 9.0),
        gap("mmoe", 5, 6, task="a", metric="auc"),
    ]  # fmt: skip
    found = summary_rows(rows, {"a": "watch", "b": "watch", "c": "inter"})
    assert {(r.method, r.metric): r.value for r in found} == {
        ("home", "auc watch"): pytest.approx(0.7),
        ("home", "auc inter"): 0.5,
        ("home", "gauc watch"): 0.7,
        ("mmoe", "auc watch"): 0.1,
    }
    assert {r.task for r in found} == {"test"}
    assert [r.metric for r in found] == ["auc watch", "auc inter", "auc watch", "gauc watch"]


def test_gains_are_those_over_networks_of_single_tasks():
    areas = {"alone": (0.6, 0.8), "home": (0.65, 0.77), "oracle": (0.9, 0.95)}
    rows = [
        Row(method, task, "auc", value)
        for method, own in areas.items()
        for task, value in zip(TASKS, own, strict=True)
    ]
    rows += [gap("home", 0.1, 0.2, task="view", metric="auc", versus="alone")]
    found = {(row.method, row.metric): row for row in gain_rows(rows, "alone")}
    assert found["home", GAIN].value == pytest.approx((0.15 / 0.1 + 0.27 / 0.3) / 2 - 1)
    assert found["home", WORSE].value == 1
    assert found["alone", GAIN].value == found["oracle", WORSE].value == 0
    assert gain_rows(rows, "absent") == []


E = 3


def report(zero_rate=0.0, std=(1.0, 1.0, 1.0), near=0.05, gate=0.5):
    """A layer of an own expert for each task and a shared one."""
    weights = np.array([[gate, 0, 1 - gate], [0, 1 - gate, gate]])
    layer = LayerReport(
        "layer 1", TASKS, ("view 0", "like 0", "shared 0"), ("view", "like", "shared"), TASKS,
        zero_rate=np.array([zero_rate, 0, 0]), near_zero_rate=np.array([near, 0, 0]),
        mean=np.zeros(E), std=np.array(std), effective_rank=np.ones(E), weights=weights,
        visible=weights > 0, row_entropy=np.zeros(2),
    )  # fmt: skip
    return ExpertReport((layer,), TASKS, (50, 5), 100)


COLLAPSE = {"zero_rate": 0.8, "std": (1.0, 30.0, 2.0)}


def bars_of(collapsed=(), healthy=()):
    reports = {"cgc": list(collapsed), "home": list(healthy)}
    rows = fault_rows({m: own for m, own in reports.items() if own})
    return {
        bar.name: bar
        for bar in fault_bars(rows, ["cgc"] if collapsed else [], ["home"] if healthy else [])
    }


def test_rows_are_medians_and_ranges_over_seeds():
    seeds = [report(gate=gate) for gate in (0.6, 0.9, 0.65)]
    rows = fault_rows({"home": seeds, "single": [ExpertReport((), TASKS, (50, 5), 100)]})
    assert {row.method for row in rows} == {"home"}
    found = {row.metric: row for row in rows}
    weight = found["task_gate_weight_max"]
    assert (weight.value, weight.low, weight.high, weight.n) == (0.65, 0.6, 0.9, 3)
    assert (found["scale_ratio"].value, {row.task for row in rows}) == (1, {"experts"})


def test_collapse_is_shown_by_every_seed():
    met = bars_of(collapsed=[report(**COLLAPSE), report(zero_rate=0.9, std=(1.0, 21.0, 2.0))])
    assert len(met) == len(COLLAPSED) == 2
    assert all(bar.met for bar in met.values())
    assert not any(bar.met for bar in bars_of(collapsed=[report(**COLLAPSE), report()]).values())
    constant = bars_of(collapsed=[report(zero_rate=1.0, std=(0.0, 1.0, 1.0))])
    assert all(bar.met and math.isfinite(bar.value) for bar in constant.values())


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({}, set()),
        ({"std": (1.0, 3.5, 1.0)}, {"scale_ratio"}),
        ({"near": 0.2}, {"near_zero_rate_max"}),
        ({"gate": 0.85}, {"task_gate_weight_max"}),
        (COLLAPSE, {"scale_ratio"}),
    ],
)
def test_health_is_lost_by_a_single_seed(change, missed):
    found = bars_of(healthy=[report(), report(**change), report()])
    assert len(found) == len(HEALTHY) == 3
    assert {name.split(" of ")[0] for name, bar in found.items() if not bar.met} == missed


def test_what_was_not_measured_is_missed():
    """Networks without experts, or an evaluation without ``experts``, show no health."""
    plain = fault_rows({"home": [ExpertReport((), TASKS, (50, 5), 100)]})
    found = fault_bars(plain, ["cgc"], ["home"])
    assert len(found) == 5
    assert all(math.isnan(bar.value) and not bar.met for bar in found)
    some = fault_bars([Row("home", "experts", "scale_ratio", 1.0, 1.0, 1.0)], [], ["home"])
    assert [bar.met for bar in some] == [True, False, False]


def test_the_first_rows_are_measured(rows_of):
    schema = FeatureSchema(tasks=tuple(map(Task, TASKS)), sparse=(Sparse("a"),), dim=3)
    torch.manual_seed(0)
    ranker = Ranker.build(schema, {"a": 9}, 0, "MMoE", {"dim": 4, "num_experts": 3})
    sparse = torch.randint(0, 9, (5000, 1))
    rows = rows_of(torch.randint(0, 2, (5000, 2)), sparse=sparse, dense=torch.zeros(5000, 0))
    found = report_of(ranker, rows)
    assert found.rows == 4096
    assert SimpleNamespace(**found.summary()).scale_ratio >= 1
    assert found.positives == tuple(rows.labels[:4096].sum(0).long().tolist())


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


def test_constant_scores_are_at_no_distance_and_missing_classes_at_none(rows_of):
    rows = rows_of(np.array([[1, 0], [0, 0], [1, 0]]))
    constant, missing = chances(rows, np.full((3, 2), 0.2), ("a", "b"))
    assert (constant.distance, constant.positives) == (0.0, 2)
    assert np.isnan([missing.auc, missing.error, missing.distance]).all()
    assert [bar.name for bar in chance_bars("control", [constant, missing])] == [
        "control: |AUC − 0.5| of a"
    ]


def test_masked_rows_do_not_count(rows_of):
    mask = np.array([[True], [True], [True], [False]])
    rows = rows_of(np.array([[1], [0], [1], [0]]))
    rows = rows.replace(mask=rows.mask & rows.mask.new_tensor(mask))
    found = chances(rows, np.array([[0.4], [0.3], [0.2], [0.9]]), ("a",))[0]
    assert (found.auc, found.positives) == (0.5, 2)
    assert found.error == pytest.approx(chance_error(2, 1))


def test_bars_hold_what_is_near_chance_or_what_is_far():
    near, far = Chance("a", 0.52, 0.01, 9), Chance("b", 0.54, 0.01, 7)
    assert [bar.met for bar in chance_bars("x", [near, far])] == [True, False]
    assert [bar.met for bar in chance_bars("x", [near, far], ">=")] == [False, True]
    rows = {row.metric: row for row in chance_rows("x", [near, far], group="controls")}
    assert (rows[DISTANCE].value, rows["auc, b"].n) == (pytest.approx(4.0), 7)
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


def test_logs_that_lack_something_are_refused(refuses):
    even = log(np.full(3, 1 / 3), 0, rows=5)
    refuses(
        GatesError,
        (
            "the log of policy b lacks the column 'click'",
            lambda: cross_estimates({"a": even, "b": even.drop("click")}),
        ),
        ("the log of policy b has no row", lambda: cross_estimates({"a": even, "b": even.clear()})),
    )


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
