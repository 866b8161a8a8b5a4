import numpy as np
import pytest

from endoscopy.evaluation.bootstrap import ClusterBootstrap


def mean_of(values):
    return lambda weights: {"mean": weights @ values / weights.sum(-1)}


def test_independent_samples_have_the_normal_interval():
    values = np.random.default_rng(0).normal(size=400)
    result = ClusterBootstrap(np.arange(400)).intervals(mean_of(values))["mean"]
    half = 1.96 * values.std() / 20
    assert result.value == pytest.approx(values.mean())
    assert result.units == 400
    assert result.low == pytest.approx(result.value - half, abs=0.1 * half)
    assert result.high == pytest.approx(result.value + half, abs=0.1 * half)


def test_copies_within_a_patient_bring_no_certainty():
    values = np.random.default_rng(0).normal(size=30)
    alone = ClusterBootstrap(np.arange(30)).intervals(mean_of(values))["mean"]
    patients = np.arange(30).repeat(20)
    copied = ClusterBootstrap(patients).intervals(mean_of(values.repeat(20)))["mean"]
    assert copied == pytest.approx(alone)
    naive = ClusterBootstrap(np.arange(600)).intervals(mean_of(values.repeat(20)))["mean"]
    assert naive.high - naive.low < 0.3 * (alone.high - alone.low)


def test_coverage_over_patients():
    draws, inside = np.random.default_rng(1), 0
    for seed in range(200):
        values = (draws.normal(size=(25, 1)) + 0.3 * draws.normal(size=(25, 4))).ravel()
        bootstrap = ClusterBootstrap(np.arange(25).repeat(4), resamples=400, seed=seed)
        result = bootstrap.intervals(mean_of(values))["mean"]
        inside += result.low <= 0 <= result.high
    assert 0.88 < inside / 200 < 0.99


def test_pairs_are_resampled_together():
    common = 10 * np.random.default_rng(0).normal(size=60)
    bootstrap = ClusterBootstrap(np.arange(60))
    ours = bootstrap.intervals(mean_of(common + 1))["mean"]
    theirs = bootstrap.intervals(mean_of(common))["mean"]
    paired = bootstrap.differences(mean_of(common + 1), mean_of(common))["mean"]
    assert ours.low < theirs.high  # apart, they look the same
    assert (paired.low, paired.high) == pytest.approx((1, 1))
    assert paired.significant
    assert paired.p_value == pytest.approx(2 / 2001)


def test_the_p_value_is_uniform_without_a_difference():
    draws = np.random.default_rng(2)
    bootstrap = ClusterBootstrap(np.arange(80), resamples=400)
    p_values = []
    for _ in range(300):
        ours, theirs = mean_of(draws.normal(size=80)), mean_of(draws.normal(size=80))
        p_values.append(bootstrap.differences(ours, theirs)["mean"].p_value)
    assert np.mean(np.array(p_values) < 0.05) == pytest.approx(0.05, abs=0.04)
    assert np.mean(p_values) == pytest.approx(0.5, abs=0.06)
    same = bootstrap.differences(ours, ours)["mean"]
    assert (same.value, same.p_value, same.significant) == (0, 1, False)


def test_seeds_add_their_own_variance():
    draws, inside, widths = np.random.default_rng(3), 0, []
    for seed in range(200):
        # Five trainings whose mean differs by seed far more than by object.
        scores = [mean_of(0.05 * draws.normal(size=50) + draws.normal()) for _ in range(5)]
        bootstrap = ClusterBootstrap(np.arange(50), resamples=400, seed=seed)
        result = bootstrap.intervals(scores)["mean"]
        inside += result.low <= 0 <= result.high
        widths.append((result.high - result.low) / (2 * 1.96))
    assert 0.78 < inside / 200 < 0.99  # few seeds: percentiles fall short of Student's t
    assert np.mean(np.square(widths)) == pytest.approx(1 / 5, rel=0.25)
    one = ClusterBootstrap(np.arange(50)).intervals(scores[0])["mean"]
    assert one.high - one.low < 0.1 * widths[-1]


def test_the_same_seeds_are_paired():
    draws = np.random.default_rng(4)
    shifts = draws.normal(size=5)
    noise = draws.normal(size=(5, 40))
    ours = [mean_of(noise[i] + shifts[i] + 0.2) for i in range(5)]
    theirs = [mean_of(noise[i] + shifts[i]) for i in range(5)]
    gap = ClusterBootstrap(np.arange(40)).differences(ours, theirs)["mean"]
    assert (gap.value, gap.low, gap.high) == pytest.approx((0.2, 0.2, 0.2))
    with pytest.raises(ValueError, match="5 seeds cannot be paired with 1"):
        ClusterBootstrap(np.arange(40)).differences(ours, theirs[0])


def test_draws_depend_on_the_seed_alone_and_not_on_chunks(monkeypatch):
    values = np.random.default_rng(0).normal(size=50)
    first = ClusterBootstrap(np.arange(50)).intervals(mean_of(values))["mean"]
    np.random.seed(1)  # noqa: NPY002
    monkeypatch.setattr("endoscopy.evaluation.bootstrap.CHUNK", 333)
    again = ClusterBootstrap(np.arange(50)).intervals(mean_of(values))["mean"]
    other = ClusterBootstrap(np.arange(50), seed=1).intervals(mean_of(values))["mean"]
    assert again == pytest.approx(first, rel=1e-12)
    assert abs(other.low - first.low) > 1e-6


def test_one_patient_tells_nothing():
    result = ClusterBootstrap(np.zeros(9)).intervals(mean_of(np.arange(9.0)))["mean"]
    assert result.value == 4
    assert np.isnan([result.low, result.high]).all()
    with pytest.raises(ValueError, match="empty"):
        ClusterBootstrap([])
