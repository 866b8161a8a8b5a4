import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.evidence import Resamples, SingleUnit, moments, root, root_ratio

COUNT = 40


def mean(draws, values):
    return draws.intervals(moments(values))["value"]


@pytest.fixture(scope="module")
def frozen():
    """Arrays on which the former bootstraps were run."""
    draws = np.random.default_rng(11)
    ids = np.arange(COUNT).repeat(3)
    values = draws.normal(size=(COUNT, 1)).repeat(3, 1).ravel() + 0.3 * draws.normal(size=120)
    squares = draws.gamma(2.0, size=(120, 2)) * np.array([1.0, 1.5])
    shocks, series = draws.normal(size=600), np.zeros(600)
    for t in range(1, 600):
        series[t] = 0.8 * series[t - 1] + shocks[t]
    seeds = values + 0.5 * draws.normal(size=(5, 1)) + 0.2 * draws.normal(size=(5, 120))
    others = seeds - 0.15 + 0.2 * draws.normal(size=(5, 120))
    clusters, blocks = Resamples.clusters(ids), Resamples.blocks(600, 25)
    ours, theirs = [moments(s) for s in seeds], [moments(s) for s in others]
    return {
        "mean": mean(clusters, values),
        "rmse": clusters.intervals(moments(squares[:, 0], root))["value"],
        "ratio": clusters.intervals(moments(squares, root_ratio))["value"],
        "series": mean(blocks, series),
        "rmse of a series": blocks.intervals(moments(series**2, root))["value"],
        "seeds": clusters.intervals(ours)["value"],
        "difference": clusters.differences(ours, theirs)["value"],
    }


@pytest.mark.parametrize(
    ("name", "value", "low", "high", "units"),
    [
        ("mean", -0.05565758289094292, -0.3120395047775792, 0.1875784476771551, 40),
        ("rmse", 1.3971876001675982, 1.3241303387931491, 1.4595747737499618, 40),
        ("ratio", 0.8052946092327469, 0.7449436182655097, 0.870728890255578, 40),
        ("series", -0.06352519997817405, -0.45925557943315143, 0.37161252952765356, 24),
        ("rmse of a series", 1.834589901177401, 1.6592604670140703, 2.025015181927392, 24),
        ("seeds", 0.10377144482756426, -0.22579406852375372, 0.39615667492935175, 40),
        ("difference", 0.13748933244467104, 0.10890850053492458, 0.16453472307292905, 40),
    ],
)
def test_the_former_bootstraps_said_the_same(frozen, name, value, low, high, units):
    found = frozen[name]
    assert found.value == pytest.approx(value, abs=1e-12)
    assert found.low == pytest.approx(low, abs=0.1 * (high - low))
    assert (found.high, found.units) == (pytest.approx(high, abs=0.1 * (high - low)), units)


@pytest.mark.parametrize("sizes", [[5] * 30, [1, 2, 9] * 10])
def test_the_deviation_of_draws_is_that_of_theory(sizes):
    """A ratio estimator: sd² = Σ_c (sum_c - mean · size_c)² / N² over clusters c."""
    ids = np.arange(30).repeat(sizes)
    values = np.random.default_rng(1).normal(size=30).repeat(sizes) + 3
    drawn = []

    def watched(weights):
        found = moments(values)(weights)
        drawn.append(found["value"])
        return found

    Resamples.clusters(ids, resamples=20_000).intervals(watched)
    theory = math.sqrt((np.bincount(ids, values - values.mean()) ** 2).sum()) / len(ids)
    assert drawn[-1].std() == pytest.approx(theory, rel=0.08)


def test_clusters_of_different_size_weigh_by_their_samples():
    values, ids = [1.0, 1.0, 1.0, 5.0], [7, 7, 7, 2]
    assert mean(Resamples.clusters(ids, level=0.98), values) == (2.0, 1.0, 5.0, 2)
    # Half of the resamples take both clusters, whose samples have the mean 2.
    assert mean(Resamples.clusters(ids, level=0.3), values) == (2.0, 2.0, 2.0, 2)


clustered = st.lists(st.integers(0, 6), min_size=2, max_size=25)


@settings(max_examples=30, deadline=None)
@given(clustered, st.randoms(use_true_random=False))
def test_the_order_of_samples_does_not_matter(ids, random):
    values = np.random.default_rng(0).normal(size=len(ids))
    order = random.sample(range(len(ids)), len(ids))
    first = mean(Resamples.clusters(ids, resamples=50), values)
    again = mean(Resamples.clusters([ids[i] for i in order], resamples=50), values[order])
    assert again == pytest.approx(first, nan_ok=True)


@settings(max_examples=30, deadline=None)
@given(clustered)
def test_whole_clusters_are_drawn_as_many_as_there_are(ids):
    def check(weights):
        for one in set(ids):
            of_cluster = weights[:, np.array(ids) == one]
            assert (of_cluster == of_cluster[:, :1]).all()
        firsts = [ids.index(one) for one in set(ids)]
        assert (weights[:, firsts].sum(1) == len(firsts)).all()
        return {"score": weights[:, 0]}

    Resamples.clusters(ids, resamples=50).intervals(check)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.data())
def test_blocks_are_drawn_to_the_length_of_the_series(length, data):
    block = data.draw(st.integers(1, length // 2))

    def check(weights):
        assert (weights.sum(1) == length).all()
        assert (weights >= 0).all()
        return {"score": weights[:, 0]}

    draws = Resamples.blocks(length, block, resamples=50)
    draws.intervals(check)
    assert draws.units == length // block


@pytest.mark.fault("faults 1")
@pytest.mark.parametrize("missing", [None, math.nan, "", pd.NA, pd.NaT], ids=repr)
def test_a_sample_of_no_known_cluster_is_its_own(missing):
    ids = ["a", "a", "b", "b", *[missing] * 6]
    values = np.random.default_rng(0).normal(size=10)
    found = mean(Resamples.clusters(ids), values)
    assert found.units == 8
    assert found == mean(Resamples.clusters(["a", "a", "b", "b", *"cdefgh"]), values)
    column = pd.Series(ids, dtype=object)
    assert mean(Resamples.clusters(column), values) == found
    assert mean(Resamples.clusters(column.to_numpy()), values) == found


@pytest.mark.fault("faults 1")
def test_no_known_cluster_at_all():
    for ids in ([""] * 9, np.full(9, np.nan), pd.Series([None] * 9, dtype="string")):
        found = mean(Resamples.clusters(ids), np.arange(9.0))
        assert found.units == 9
        assert found.low < 4 < found.high


def test_ids_of_any_type():
    values = np.random.default_rng(0).normal(size=4)
    expected = mean(Resamples.clusters([0, 0, 1, 2]), values)
    for ids in (
        torch.tensor([3, 3, 5, 7]),
        pd.Series(["x", "x", "y", "z"], dtype="category"),
        pd.array([1, 1, 2, 3], dtype="Int64"),
        (name for name in "aabc"),
        [("p", 1), ("p", 1), ("p", 2), ("q", 1)],
        [1, 1, "1", (1,)],
    ):
        assert mean(Resamples.clusters(ids), values).units == 3
    assert mean(Resamples.clusters(torch.tensor([3, 3, 5, 7])), values) == expected


@pytest.mark.fault("faults 4")
def test_one_cluster_tells_nothing():
    draws = Resamples.clusters(["p"] * 9)
    values = np.arange(9.0)
    found = mean(draws, values)
    assert (found.value, found.units) == (4, 1)
    assert np.isnan([found.low, found.high]).all()
    gap = draws.differences(moments(values + 1), moments(values))["value"]
    assert (gap.value, gap.p, gap.units, gap.significant) == (1, 1, 1, False)
    assert np.isnan([gap.low, gap.high]).all()


@pytest.mark.fault("faults 4")
@pytest.mark.parametrize(
    ("units", "p"), [(2, 0.5), (4, 0.125), (5, 0.0625), (6, 0.03125), (20, 2 / 2001)]
)
def test_p_has_a_floor_by_the_number_of_clusters(units, p):
    values = np.random.default_rng(0).normal(size=3 * units)
    draws = Resamples.clusters(np.arange(units).repeat(3))
    gap = draws.differences(moments(values + 1), moments(values))["value"]
    assert (gap.low, gap.high) == pytest.approx((1, 1))
    assert (gap.p, gap.significant) == (pytest.approx(p, rel=1e-12), units > 5)


def test_p_has_a_floor_by_the_number_of_draws():
    draws = Resamples.clusters(range(50), resamples=30)
    values = np.random.default_rng(0).normal(size=50)
    gap = draws.differences(moments(values + 1), moments(values))["value"]
    assert gap.p == pytest.approx(2 / 31)
    assert not gap.significant


def test_blocks_have_the_floor_of_as_many_clusters():
    values = np.random.default_rng(0).normal(size=100)
    gap = Resamples.blocks(100, 20).differences(moments(values + 1), moments(values))["value"]
    assert (gap.units, gap.p, gap.significant) == (5, 0.0625, False)


def test_pairs_are_resampled_together():
    common = 10 * np.random.default_rng(0).normal(size=60)
    draws = Resamples.clusters(range(60))
    ours, theirs = mean(draws, common + 1), mean(draws, common)
    gap = draws.differences(moments(common + 1), moments(common))["value"]
    assert ours.low < theirs.high  # apart, they look the same
    assert (gap.low, gap.high) == pytest.approx((1, 1))
    assert gap.significant


@pytest.mark.parametrize("draws", [Resamples.clusters(range(40)), Resamples.blocks(40, 4)])
def test_a_method_differs_from_itself_by_nothing(draws):
    random = np.random.default_rng(3)
    scores = [moments(random.normal(size=40), name="score") for _ in range(3)]
    for own in (scores, scores[0]):
        gap = draws.differences(own, own)["score"]
        assert gap[:4] == (0, 0, 0, 1)
        assert not gap.significant


def test_p_is_uniform_without_a_difference():
    random, draws = np.random.default_rng(2), Resamples.clusters(range(80), resamples=400)
    found = []
    for _ in range(300):
        ours, theirs = moments(random.normal(size=80)), moments(random.normal(size=80))
        found.append(draws.differences(ours, theirs)["value"].p)
    assert np.mean(np.array(found) < 0.05) == pytest.approx(0.05, abs=0.04)
    assert np.mean(found) == pytest.approx(0.5, abs=0.06)


def test_seeds_add_their_own_variance():
    random, inside, widths = np.random.default_rng(3), 0, []
    for seed in range(200):
        # Five training runs whose mean differs by seed far more than by sample.
        scores = [moments(0.05 * random.normal(size=50) + random.normal()) for _ in range(5)]
        draws = Resamples.clusters(range(50), resamples=400, seed=seed)
        found = draws.intervals(scores)["value"]
        inside += found.low <= 0 <= found.high
        widths.append((found.high - found.low) / (2 * 1.96))
    assert 0.78 < inside / 200 < 0.99  # few seeds: percentiles fall short of Student's t
    assert np.mean(np.square(widths)) == pytest.approx(1 / 5, rel=0.25)
    one = draws.intervals(scores[0])["value"]
    assert one.high - one.low < 0.1 * widths[-1]


def test_the_same_seeds_are_paired():
    random = np.random.default_rng(4)
    shifts, noise = random.normal(size=5), random.normal(size=(5, 40))
    ours = [moments(noise[i] + shifts[i] + 0.2) for i in range(5)]
    theirs = [moments(noise[i] + shifts[i]) for i in range(5)]
    draws = Resamples.clusters(range(40))
    gap = draws.differences(ours, theirs)["value"]
    assert (gap.value, gap.low, gap.high) == pytest.approx((0.2, 0.2, 0.2))
    with pytest.raises(ValueError, match="5 seeds cannot be paired with 2"):
        draws.differences(ours, theirs[:2])


def test_a_method_without_seeds_is_paired_with_every_seed():
    random = np.random.default_rng(5)
    ours = [moments(random.normal(size=40)) for _ in range(3)]
    fixed = moments(random.normal(size=40))
    draws = Resamples.clusters(range(40))
    for pair, repeated in (
        ((ours, fixed), (ours, [fixed] * 3)),
        (([fixed], ours), ([fixed] * 3, ours)),
    ):
        gap, expected = (draws.differences(*one)["value"] for one in (pair, repeated))
        assert gap == pytest.approx(expected)


def test_blocks_are_of_successive_samples():
    found = mean(Resamples.blocks(10, 4, level=0.999, resamples=5000), np.arange(10.0))
    # The least mean takes the first blocks 0..3, 0..3 and 0..1, the greatest 6..9 and 6..7.
    assert (found.low, found.high) == (pytest.approx(1.3), pytest.approx((30 + 30 + 13) / 10))


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: Resamples.clusters(range(50), seed=seed),
        lambda seed: Resamples.blocks(50, 7, seed=seed),
    ],
)
def test_draws_depend_on_the_seed_alone_and_not_on_chunks(make, monkeypatch):
    values = np.random.default_rng(0).normal(size=50)
    first = mean(make(0), values)
    np.random.seed(1)  # noqa: NPY002
    monkeypatch.setattr("harness.evidence.bootstrap.CHUNK", 333)
    assert mean(make(0), values) == pytest.approx(first, rel=1e-12)
    assert abs(mean(make(1), values).low - first.low) > 1e-6


def test_draws_without_a_score_are_left_out():
    """A share among the first sample's kind is undefined where that sample is not drawn."""

    def scores(weights):
        score = np.where(weights[:, 0] > 0, weights[:, 1], np.nan)
        return {"score": score, "none": np.full(len(weights), np.nan)}

    found = Resamples.clusters(range(20)).intervals(scores)
    assert np.isfinite(found["score"][:3]).all()
    assert np.isnan(found["none"][:3]).all()
    gap = Resamples.clusters(range(20)).differences(scores, scores)["none"]
    assert gap.p == 1
    assert not gap.significant


def test_two_thousand_draws_of_a_thousand_clusters_are_no_loop_over_clusters(count_calls):
    values = np.random.default_rng(0).normal(size=1000)
    _, calls = count_calls(lambda: mean(Resamples.clusters(range(1000)), values))
    assert calls < 20 * 2000


def one_score(weights):
    return {"a": weights[:, 0]}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Resamples.clusters([]), "ids are empty"),
        (lambda: Resamples.clusters(np.zeros((3, 2))), r"shape \(3, 2\), expected one a sample"),
        (lambda: Resamples.clusters([1, 2], resamples=0), "found 0 resamples"),
        (lambda: Resamples.clusters([1, 2], level=95), "level 95"),
        (lambda: Resamples.blocks(9, 5), "a block of 5 does not fit twice into 9 samples"),
        (lambda: Resamples.blocks(9, 0), "twice"),
        (lambda: Resamples.clusters([1, 2]).intervals([]), "there are no scores"),
        (
            lambda: Resamples.clusters([1, 2]).intervals([one_score, moments([1, 2])]),
            "seeds differ in their scores: a, value",
        ),
        (lambda: mean(Resamples.clusters([1, 2]), [1, 2, 3]), "2 samples are drawn, but 3"),
    ],
)
def test_bad_arguments(refuses, call, message):
    refuses(ValueError, (message, lambda: call()))


@pytest.mark.fault("video R15")
def test_a_score_that_rests_on_one_unit_has_no_interval():
    draws = Resamples.clusters([1, 1, 2, 3], resamples=50)

    def scores(weights):
        """The mean of the last unit, and of all."""
        with np.errstate(invalid="ignore"):
            last = weights[:, 3] * 4.0 / weights[:, 3]
        return {"last": last, "all": weights @ [1.0, 2, 3, 4] / weights.sum(-1)}

    plain = draws.intervals(scores)
    found = draws.intervals(SingleUnit(scores, ["last"]))
    assert (plain["last"][1:3], (found["last"].value, found["last"].units)) == ((4, 4), (4, 1))
    assert math.isnan(found["last"].low)
    assert math.isnan(found["last"].high)
    assert found["all"] == plain["all"]
    gap = draws.differences([scores, SingleUnit(scores, ["last"])], [scores, scores])
    assert (gap["last"].p, gap["last"].units, gap["all"].units) == (1, 1, 3)
