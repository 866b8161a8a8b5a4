import time

import numpy as np
import pytest

from core_gates.errors import GatesError
from harness.evidence import Resamples, compare
from recsys.metrics import (
    auc,
    auc_scores,
    combined,
    gauc,
    log_loss,
    normalized_entropy,
    per_user_sums,
    predicted_over_observed,
    resampled,
    summed_log_loss,
    task_scores,
    user_resamples,
)


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


def test_users_are_drawn_as_clusters_of_rows_are():
    labels, probs, owner, _, _ = rows()
    truth = np.where(np.isnan(labels[:, 0]), 0, labels[:, 0])
    index = np.unique(owner, return_inverse=True)[1]
    per_row = Resamples.clusters(owner, resamples=200, seed=3)
    of_rows = auc_scores(probs[:, 0], truth, np.arange(len(owner)))
    of_users = auc_scores(probs[:, 0], truth, index)
    expected = per_row.intervals(of_rows)["auc"]
    found = user_resamples(owner, resamples=200, seed=3).intervals(of_users)["auc"]
    assert found == pytest.approx(expected, abs=1e-12)


def test_chunks_change_nothing(monkeypatch):
    labels, probs, owner, mask, _ = rows()
    scores = auc_scores(probs[:, 1], labels[:, 1], owner, mask=mask[:, 1])
    draws = np.random.default_rng(3).integers(0, 4, (50, len(np.unique(owner))))
    whole = scores(draws)["auc"]
    monkeypatch.setattr(resampled, "CELLS", 1500)
    np.testing.assert_array_equal(scores(draws)["auc"], whole)


def test_compare_finds_the_better_model():
    rng = np.random.default_rng(4)
    owner, truth = rng.integers(0, 200, 4000), rng.random((4000, 2))
    labels = (rng.random((4000, 2)) < truth).astype(int)
    noisy = np.clip(truth + rng.normal(0, 0.3, truth.shape), 0.01, 0.99)
    draws = user_resamples(owner, resamples=300)
    scores = {
        name: combined(summed_log_loss(labels, p, owner), auc_scores(p[:, 0], labels[:, 0], owner))
        for name, p in (("oracle", truth), ("noisy", noisy))
    }
    found = {r.metric: r for r in compare(scores, draws, task="all", reference="noisy") if r.versus}
    assert found["log_loss"].high < 0 < found["auc"].low
    assert found["auc"].n == 200


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
    assert users.tolist() == ["a", "b"]
    assert sums.tolist() == [[2, 20], [4, 40]]
    assert per_user_sums([5, 5], [1, 2])[1].tolist() == [[3]]


def test_a_thousand_resamples_of_real_size_take_less_than_three_seconds():
    rng = np.random.default_rng(5)
    owner, probs = rng.integers(0, 664, 22_000), rng.random(22_000)
    scores = auc_scores(probs, rng.random(22_000) < probs, owner)
    start = time.process_time()
    found = user_resamples(owner, resamples=1000).intervals(scores)["auc"]
    assert time.process_time() - start < 3
    assert found.low < found.value < found.high


def test_faults():
    labels, probs, owner, mask, _ = rows(10)
    with pytest.raises(GatesError, match=r"labels \(10, 3\) and probs \(10, 2\)"):
        summed_log_loss(labels, probs[:, :2], owner)
    with pytest.raises(GatesError, match="labels are neither 0 nor 1"):
        summed_log_loss(labels, probs, owner)
    with pytest.raises(GatesError, match=r"mask has shape \(10,\)"):
        summed_log_loss(labels, probs, owner, mask=mask[:, 0])
    with pytest.raises(GatesError, match="no task has a row that counts"):
        summed_log_loss(labels, probs, owner, mask=np.zeros_like(mask))
    with pytest.raises(GatesError, match="apply the sigmoid"):
        task_scores(labels[:, 0], 2 * probs[:, 0], owner, mask=mask[:, 0])
    with pytest.raises(GatesError, match="expected one for each of 10 rows"):
        task_scores(labels[:, 0], probs[:, 0], owner[:5], mask=mask[:, 0])


@pytest.mark.fault("video V31")
def test_a_task_that_counts_in_rows_without_weight_alone_is_left_out():
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
    with pytest.raises(GatesError, match="no task has a row that counts"):
        summed_log_loss(labels, probs, owner, mask=mask, weights=0 * weights)
    with pytest.raises(GatesError, match=r"weights have shape \(599,\), expected \(600,\)"):
        summed_log_loss(labels, probs, owner, mask=mask, weights=weights[:-1])
