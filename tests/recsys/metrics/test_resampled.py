"""Metrics by resampling, by slice, off policy and of play time."""

import math
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core_gates.errors import GatesError
from recsys.metrics import (
    auc,
    auc_scores,
    combined,
    counts_of,
    gauc,
    gxauc,
    log_loss,
    mean_absolute_error,
    normalized_entropy,
    off_policy,
    per_user_sums,
    predicted_over_observed,
    quantile_slices,
    resampled,
    standard_slices,
    summed_log_loss,
    task_scores,
    user_resamples,
    user_xauc,
    xauc,
)
from recsys.metrics.play_time import larger_before


def rows(n=600, users=40, seed=0):
    rng = np.random.default_rng(seed)
    owner = rng.integers(0, users, n) * 7 - 50
    probs = rng.random((n, 3)).round(2)
    labels = (rng.random((n, 3)) < probs).astype(float)
    mask = rng.random((n, 3)) < 0.8
    labels[~mask] = np.nan
    return labels, probs, owner, mask, rng.random(n)


def repeated(draw, owner, *columns):
    """Rows as they are drawn: those of a user once for every time that it is drawn."""
    names = np.unique(owner)
    times = draw.astype(int)[np.searchsorted(names, owner)]
    copy = np.concatenate([np.arange(k) for k in times])
    return [np.repeat(owner, times) + 10_000 * copy, *(np.repeat(c, times, 0) for c in columns)]


def test_scores_are_those_of_the_rows_that_were_drawn():
    labels, probs, owner, mask, weights = rows()
    draws = np.random.default_rng(1).integers(0, 4, (5, len(np.unique(owner))))
    found = task_scores(labels[:, 0], probs[:, 0], owner, mask=mask[:, 0], weights=weights)(draws)
    assert list(found) == ["log_loss", "ne", "pcoc", "gauc", "gauc_mean", "auc"]
    for r, draw in enumerate(draws):
        users, y, p, kept, w = repeated(draw, owner, labels[:, 0], probs[:, 0], mask[:, 0], weights)
        users, y, p, w = users[kept], y[kept], p[kept], w[kept]
        groups = gauc(p, y, users, w)
        expected = {
            "log_loss": log_loss(p, y, w).value,
            "ne": normalized_entropy(p, y, w).value,
            "pcoc": predicted_over_observed(p, y, w).value,
            "gauc": groups.weighted,
            "gauc_mean": groups.mean,
            "auc": auc(p, y, w).value,
        }
        assert {k: v[r] for k, v in found.items()} == pytest.approx(expected, abs=1e-12)


def test_summed_log_loss_is_the_sum_over_tasks():
    labels, probs, owner, mask, weights = rows()
    draws = np.random.default_rng(2).integers(0, 3, (4, len(np.unique(owner))))
    total = summed_log_loss(labels, probs, owner, mask=mask, weights=weights)(draws)["log_loss"]
    parts = [
        task_scores(labels[:, t], probs[:, t], owner, mask=mask[:, t], weights=weights)(draws)
        for t in range(3)
    ]
    np.testing.assert_allclose(total, sum(part["log_loss"] for part in parts), atol=1e-12)
    mask[:, 1] = False
    total = summed_log_loss(labels, probs, owner, mask=mask, weights=weights)(draws)["log_loss"]
    np.testing.assert_allclose(total, parts[0]["log_loss"] + parts[2]["log_loss"], atol=1e-12)


def test_chunks_change_nothing(monkeypatch):
    labels, probs, owner, mask, _ = rows()
    scores = auc_scores(probs[:, 1], labels[:, 1], owner, mask=mask[:, 1])
    draws = np.random.default_rng(3).integers(0, 4, (50, len(np.unique(owner))))
    whole = scores(draws)["auc"]
    monkeypatch.setattr(resampled, "CELLS", 1500)
    np.testing.assert_array_equal(scores(draws)["auc"], whole)


@pytest.mark.fault("video R15")
def test_a_task_that_counts_for_one_user_has_no_interval():
    """Resamples weigh its rows alike, so that their spread would be 0 and any gap significant."""
    rng = np.random.default_rng(0)
    owner, labels, probs = np.repeat(np.arange(20), 10), *rng.random((2, 200, 2)).round(3)
    labels = (labels < 0.5).astype(int)
    mask = np.ones((200, 2), dtype=bool)
    mask[:, 1] = owner == 0
    weights = np.where(owner == 0, 1.0, np.arange(200) % 2)
    draws = user_resamples(owner, resamples=200)

    def scores(probs, mask=mask):
        summed = summed_log_loss(
            labels, probs, owner, mask=mask, weights=weights, tasks=["all", "one"]
        )
        return combined(summed, auc_scores(probs[:, 1], labels[:, 1], owner, mask=mask[:, 1]))

    found = draws.intervals(scores(probs))
    assert {name for name, one in found.items() if np.isnan(one.low)} == {"one", "auc"}
    assert [found[name].units for name in ("log_loss", "all", "one", "auc")] == [20, 20, 1, 1]
    assert all(np.isfinite(one.value) for one in found.values())
    gap = draws.differences(scores(probs), scores(probs / 2))["one"]
    assert np.isnan(gap.low)
    assert (gap.p, gap.units, gap.significant) == (1, 1, False)
    alone = draws.intervals(task_scores(labels[:, 1], probs[:, 1], owner, mask=mask[:, 1]))
    assert len(alone) == 6
    assert all(np.isnan(one.low) and np.isnan(one.high) for one in alone.values())
    both = draws.intervals(scores(probs, mask | (owner == 1)[:, None]))
    assert both["one"].low < both["one"].value < both["one"].high


def test_a_task_without_positives_has_no_area():
    found = user_resamples([1, 2, 2]).intervals(task_scores([0, 0, 0], [0.1, 0.2, 0.3], [1, 2, 2]))
    assert np.isnan(found["auc"].value)
    assert np.isnan(found["gauc"].low)
    assert found["log_loss"].value == pytest.approx(log_loss([0.1, 0.2, 0.3], [0, 0, 0]).value)


def test_per_user_sums():
    users, sums = per_user_sums(["b", "a", "b"], [[1, 10], [2, 20], [3, 30]])
    assert (users.tolist(), sums.tolist()) == (["a", "b"], [[2, 20], [4, 40]])
    assert per_user_sums([5, 5], [1, 2])[1].tolist() == [[3]]


def test_a_thousand_resamples_of_real_size_are_no_loop_over_users(count_calls):
    rng = np.random.default_rng(5)
    owner, probs = rng.integers(0, 664, 22_000), rng.random(22_000)
    scores = auc_scores(probs, rng.random(22_000) < probs, owner)
    found, calls = count_calls(lambda: user_resamples(owner, resamples=1000).intervals(scores))
    found = found["auc"]
    assert calls < 10 * 1000
    assert found.low < found.value < found.high


def test_faults():
    labels, probs, owner, mask, _ = rows(10)
    for words, function, arguments, counted in (
        (r"labels \(10, 3\) and probs \(10, 2\)", summed_log_loss, (labels, probs[:, :2]), None),
        ("labels are neither 0 nor 1", summed_log_loss, (labels, probs), None),
        (r"mask has shape \(10,\)", summed_log_loss, (labels, probs), mask[:, 0]),
        ("no task has a row that counts", summed_log_loss, (labels, probs), mask & False),
        ("apply the sigmoid", task_scores, (labels[:, 0], 2 * probs[:, 0]), mask[:, 0]),
    ):
        with pytest.raises(GatesError, match=words):
            function(*arguments, owner, mask=counted)
    with pytest.raises(GatesError, match="expected one for each of 10 rows"):
        task_scores(labels[:, 0], probs[:, 0], owner[:5], mask=mask[:, 0])


@pytest.mark.fault("video V31")
def test_a_task_that_counts_in_rows_without_weight_alone_is_left_out(refuses):
    """Its mean is 0 / 0, and was so the sum of all."""
    labels, probs, owner, mask, weights = rows()
    mask[:, 1] = weights < 0.2
    weights[weights < 0.2] = 0
    found = summed_log_loss(labels, probs, owner, mask=mask, weights=weights, tasks="abc")
    draws = np.ones((1, len(np.unique(owner))))
    two = [0, 2]
    alone = summed_log_loss(
        labels[:, two], probs[:, two], owner, mask=mask[:, two], weights=weights
    )
    assert set(found(draws)) == {"log_loss", "a", "c"}
    assert found(draws)["log_loss"] == alone(draws)["log_loss"]
    refuses(
        GatesError,
        (
            "no task has a row that counts",
            lambda: summed_log_loss(labels, probs, owner, mask=mask, weights=0 * weights),
        ),
        (
            r"weights have shape \(599,\), expected \(600,\)",
            lambda: summed_log_loss(labels, probs, owner, mask=mask, weights=weights[:-1]),
        ),
    )


def test_standard_slices():
    users, items = np.array([1, 1, 2, 9, 3]), np.array(["a", "b", "a", "c", "z"])
    found = standard_slices(
        users,
        items,
        train_users=[1, 1, 1, 2, 3, 3],
        train_items=["a"] * 5 + ["b"] + ["c"] * 2,
        random=[0, 0, 1, 0, 0],
        parts=2,
    )
    where = {name: np.flatnonzero(rows).tolist() for name, rows in found.items()}
    assert where == {
        "new users": [3],
        "known users": [0, 1, 2, 4],
        "new items": [4],
        "known items": [0, 1, 2, 3],
        "activity 1/2": [2, 4],
        "activity 2/2": [0, 1],
        "exposure 1/2": [1, 3],
        "exposure 2/2": [0, 2],
        "random exposure": [2],
        "ranked exposure": [0, 1, 3, 4],
    }


def test_parts_without_rows_are_left_out():
    found = standard_slices([1, 1], [2, 2], train_users=[1], train_items=[2])
    assert "new users" not in found
    assert sum(name.startswith("activity") for name in found) == 1


def test_quantiles_divide_rows_and_keep_ties_together():
    values = np.random.default_rng(0).integers(0, 30, 1000)
    parts = quantile_slices("rows", values, parts=4)
    assert list(parts) == ["rows 1/4", "rows 2/4", "rows 3/4", "rows 4/4"]
    assert (sum(part.astype(int) for part in parts.values()) == 1).all()
    assert all(200 < part.sum() < 300 for part in parts.values())
    for low, high in pairwise(parts.values()):
        assert values[low].max() < values[high].min()


def test_counts():
    assert counts_of([3, 1, 7], [1, 3, 3, 5]).tolist() == [2, 1, 0]
    assert counts_of(["b", "x"], []).tolist() == [0, 0]


def test_faults_of_slices(refuses):
    refuses(
        GatesError,
        (
            "2 users and 1 items",
            lambda: standard_slices([1, 2], [1], train_users=[], train_items=[]),
        ),
        (
            r"random has shape \(1,\)",
            lambda: standard_slices([1, 2], [1, 2], train_users=[], train_items=[], random=[1]),
        ),
    )
    with pytest.raises(ValueError, match="1 names for 2 parts"):
        quantile_slices("x", [1, 2], parts=2, names=["low"])
    assert quantile_slices("x", [1.0], among=np.array([False])) == {}


def log_of(rng, rows=2000, arms=5):
    """A log of a skewed policy; the click rate of each arm is known."""
    rates = np.linspace(0.05, 0.4, arms)
    policy = rng.dirichlet(np.ones(arms))
    policy = 0.9 * policy + 0.1 / arms
    arm = rng.choice(arms, rows, p=policy)
    return rng.random(rows) < rates[arm], arm, policy, rates


def test_intervals_of_the_uniform_policy_hold_the_truth():
    held = np.zeros(2)
    rng = np.random.default_rng(0)
    for _ in range(100):
        rewards, arm, policy, rates = log_of(rng)
        found = off_policy(rewards, np.full(2000, 0.2), policy[arm])
        held += [one.low <= rates.mean() <= one.high for one in (found.ips, found.snips)]
    assert (held >= 85).all()
    assert (held < 100).all()


def test_the_logging_policy_itself_earns_its_mean():
    rewards, arm, policy, _ = log_of(np.random.default_rng(1))
    found = off_policy(rewards, policy[arm], policy[arm])
    assert found.ips.value == found.snips.value == pytest.approx(rewards.mean())
    assert found.effective == len(rewards) == found.rows
    error = np.sqrt(rewards.var(ddof=1) / len(rewards))
    assert found.ips.high - found.ips.low == pytest.approx(2 * 1.959964 * error, rel=1e-6)


def test_effective_sample_size():
    target, logged = np.array([0.5, 0.5, 0.9]), np.array([0.5, 0.05, 0.9])
    plain = off_policy(np.array([1, 1, 0]), target, logged)
    assert (plain.ips.value, plain.snips.value) == (pytest.approx(11 / 3), pytest.approx(11 / 12))
    assert plain.effective == pytest.approx(144 / 102)


def test_clusters_widen_the_interval():
    rng = np.random.default_rng(2)
    users = np.repeat(np.arange(50), 40)
    rewards = rng.random(50)[users] > rng.random(2000)
    ones = np.full(2000, 0.5)
    rows = off_policy(rewards, ones, ones).snips
    clustered = off_policy(rewards, ones, ones, clusters=users).snips
    _, sums = per_user_sums(users, rewards)  # of 40 rows each
    drawn = user_resamples(users).intervals(lambda w: {"mean": w @ sums[:, 0] / (40 * w.sum(1))})
    drawn = drawn["mean"]
    assert clustered.units == drawn.units == 50
    assert clustered.value == pytest.approx(drawn.value)
    assert clustered.high - clustered.low > 2 * (rows.high - rows.low)
    assert drawn.high - drawn.low == pytest.approx(clustered.high - clustered.low, rel=0.15)


def test_a_policy_that_never_takes_a_logged_action_has_no_estimate():
    found = off_policy([1, 0], [0, 0], [0.5, 0.5])
    assert found.ips.value == 0
    assert np.isnan(found.snips.value)
    assert found.effective == 0


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (([1], [0.5], [0.0]), r"logged probabilities must lie in \(0, 1\]"),
        (([1], [1.5], [0.5]), r"target probabilities lie in \[0, 1\], found 1.5 to 1.5"),
        (([1, 0], [0.5], [0.5]), "expected one finite number for each of 1 rows"),
        (([1], [0.5, 0.5], [0.5]), r"target \(2,\) and logged \(1,\)"),
    ],
)
def test_faults_of_policies(arguments, line):
    with pytest.raises(GatesError, match=line):
        off_policy(*arguments)


ROWS = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 2)), min_size=1, max_size=25
)


def by_pairs(predicted, observed):
    right = pairs = 0.0
    for i, j in combinations(range(len(predicted)), 2):
        truth, guess = observed[i] - observed[j], predicted[i] - predicted[j]
        if truth:
            pairs += 1
            right += 0.5 if guess == 0 else truth * guess > 0
    return right / pairs if pairs else math.nan


@given(ROWS)
def test_equals_a_loop_over_pairs(rows):
    predicted, observed, users = map(np.array, zip(*rows, strict=True))
    found, expected = xauc(predicted, observed), by_pairs(predicted, observed)
    assert found.value == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert bool(found.reason) == math.isnan(expected)
    names = sorted(set(users))
    areas = [by_pairs(predicted[users == u], observed[users == u]) for u in names]
    assert user_xauc(predicted, observed, users).auc.tolist() == pytest.approx(areas, nan_ok=True)
    sizes = [(users == u).sum() for u, a in zip(names, areas, strict=True) if a == a]
    areas = [a for a in areas if a == a]
    grouped = gxauc(predicted, observed, users)
    assert (grouped.users, grouped.excluded) == (len(areas), len(names) - len(areas))
    if areas:
        assert grouped.mean == pytest.approx(np.mean(areas))
        assert grouped.weighted == pytest.approx(np.average(areas, weights=sizes))


@given(st.lists(st.integers(0, 300), max_size=60))
def test_larger_numbers_before_each(numbers):
    expected = [sum(a > b for a in numbers[:i]) for i, b in enumerate(numbers)]
    assert larger_before(np.array(numbers, dtype=int)).tolist() == expected


def test_mean_absolute_error():
    assert mean_absolute_error([1, 2, 3], [1, 4, 0]).value == pytest.approx(5 / 3)
    assert mean_absolute_error([1, 2, 3], [1, 4, 0], [0, 1, 3]).value == pytest.approx(11 / 4)
    assert mean_absolute_error([], []).reason == "no row"


def test_faults_of_play_time(refuses):
    refuses(
        GatesError,
        (r"predicted \(2,\) and observed \(1,\)", lambda: xauc([1, 2], [1])),
        ("must not be NaN", lambda: mean_absolute_error([np.nan], [1])),
    )
    assert xauc([1, 2], [3, 3]).reason == "no two rows differ"
    assert gxauc([1, 2], [3, 3], [0, 0]).reason == "no user has two rows that differ"
    assert xauc([], []).reason == "no row"
