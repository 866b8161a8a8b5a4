import datetime

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal
from scipy.stats import chi2

from core_gates import GatesError
from video_multitask.feed import LABELS
from video_multitask.simulator.exposure import (
    Visits,
    draw_outcomes,
    interaction_probabilities,
    watch_probabilities,
)
from video_multitask.simulator.exposure import truth as truth_of
from video_multitask.simulator.hidden import BASE_RATES, GAP_S, INTEREST_NOISE, TASKS
from video_multitask.simulator.log import simulate

KUAIRAND = [
    "user_id", "video_id", "date", "hourmin", "time_ms", "is_click", "is_like", "is_follow",
    "is_comment", "is_forward", "is_hate", "long_view", "play_time_ms", "duration_ms",
    "profile_stay_time", "comment_stay_time", "is_profile_enter", "is_rand", "tab",
]  # fmt: skip
WATCH_RATES = np.array([0.54, 0.35, 0.19, 0.07, 0.24])


@pytest.fixture(scope="module")
def feed():
    return simulate(rows=120_000, users=1_500, videos=3_000, seed=3)


def labels(log):
    return log.select(LABELS.values()).to_numpy().astype(np.float64)


@pytest.mark.parametrize(
    ("seed", "users", "videos", "groups"), [(0, 2_000, 4_000, True), (8, 900, 700, False)]
)
def test_rates_are_those_of_the_specified_world(seed, users, videos, groups):
    feed = simulate(60_000, users, videos, seed=seed, groups=groups)
    np.testing.assert_allclose(feed.truth[:, :5].mean(0), WATCH_RATES, atol=0.04)
    wanted = np.array(list(BASE_RATES.values()))
    np.testing.assert_allclose(feed.truth[:, 5:].mean(0, dtype=float), wanted, rtol=0.1)


def test_labels_are_calibrated_to_the_truth(feed):
    """χ² over ten bins of equal mass per task; a constant shift of the logits by .2 is refused."""
    y, p = labels(feed.log), feed.truth.astype(np.float64)
    odds = p / (1 - p) * np.exp(0.2)
    assert statistics(y, p).max() < chi2.ppf(1 - 1e-4, 10)
    assert (statistics(y, odds / (1 + odds))[:7] > chi2.ppf(1 - 1e-4, 10)).all()


def statistics(y, p):
    results = []
    for task in range(y.shape[1]):
        bins = np.array_split(np.argsort(p[:, task], kind="stable"), 10)
        values = [
            (y[b, task].sum() - p[b, task].sum()) ** 2 / (p[b, task] * (1 - p[b, task])).sum()
            for b in bins
        ]
        results.append(sum(values))
    return np.array(results)


def oracle(world, log):
    """The true probabilities (n, 14) of any rows, shown or not."""
    names = ("user_id", "video_id", "hourmin", "position", "tab")
    user, video, hourmin, position, tab = (log[n].cast(pl.Int64).to_numpy() for n in names)
    dates = log["date"].cast(pl.String).str.to_date("%Y%m%d")
    day = (dates - datetime.date(2022, 4, 8)).dt.total_days().to_numpy()
    found = np.empty((len(log), len(LABELS)), np.float32)
    for one in np.unique(day):
        rows = day == one
        visits = Visits(user[rows], position[rows], hourmin[rows] * 36_000, tab[rows])
        found[rows] = truth_of(world._expected(visits, video[rows], int(one)))
    return found


def test_the_oracle_knows_any_row_without_its_outcome(feed):
    some = feed.log.filter(pl.col("date") % 3 == 0)
    known = some.select("user_id", "video_id", "date", "hourmin", "position", "tab")
    rows = (feed.log["date"] % 3 == 0).to_numpy()
    np.testing.assert_array_equal(oracle(feed.world, known), feed.truth[rows])


def test_probabilities_are_means_over_the_noise(feed):
    """What is integrated in closed form is the mean of outcomes that are drawn again and again."""
    visits = feed.world._visits(1_400, 2, 9)
    video = np.arange(100) * 7
    expected = feed.world._expected(visits.take(slice(100)), video, 2)
    rng = np.random.default_rng(0)
    draws = [draw_outcomes(expected, rng) for _ in range(3_000)]
    play = np.stack([draw.play_ms for draw in draws])
    complete = (play >= expected.duration_ms).mean(0)
    skip = (play < 3_000).mean(0)
    error = 4.5 * 0.5 / np.sqrt(3_000)
    watch = watch_probabilities(expected)
    np.testing.assert_allclose(complete, watch[:, 2], atol=error)
    np.testing.assert_allclose(skip, watch[:, 4], atol=error)

    z = np.linspace(-8, 8, 4_001)
    density = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi) * (z[1] - z[0])
    at = expected.interest[:, None] + INTEREST_NOISE * z
    logits = expected.logits[:, :, None] + expected.slopes[:, None] * at[:, None, :]
    exact = (density / (1 + np.exp(-logits))).sum(-1)
    np.testing.assert_allclose(interaction_probabilities(expected), exact, rtol=2e-6)
    assert np.abs(np.stack([draw.interactions for draw in draws]).mean(0) - exact).max() < error


def test_the_same_arguments_give_the_same_bytes_in_any_partition(feed):
    whole, parts = (list(feed.world.stream(18_000, chunk=size)) for size in (16_384, 1_000))
    assert [len(part.log) for part in (*whole, *parts)] == [16_384, 1_616, *[1_000] * 18]
    assert_frame_equal(pl.concat([p.log for p in parts]), pl.concat([p.log for p in whole]))
    joined = [np.concatenate([p.truth for p in some]) for some in (whole, parts)]
    np.testing.assert_array_equal(*joined)
    one, again, other = (simulate(9_000, users=200, videos=400, seed=n) for n in (3, 3, 4))
    for name in ("log", "users", "videos"):
        assert_frame_equal(getattr(again, name), getattr(one, name))
    assert (other.log["video_id"] == one.log["video_id"]).mean() < 0.05


def test_another_draw_is_another_log_of_the_same_world(feed):
    chunk = next(feed.world.stream(120_000, draw=1))
    assert not chunk.log["user_id"].equals(feed.log["user_id"][: len(chunk.log)])
    np.testing.assert_array_equal(oracle(feed.world, chunk.log), chunk.truth)


def test_the_log_has_the_schema_and_rules_of_kuairand(feed):
    log = feed.log
    assert log.columns[:19] == KUAIRAND
    assert log["time_ms"].is_sorted()
    assert len(log) == 120_000
    local = pl.from_epoch("time_ms", time_unit="ms") + pl.duration(hours=8)
    date = local.dt.strftime("%Y%m%d").cast(pl.Int32)
    hour = local.dt.hour().cast(pl.Int32) * 100
    assert log.select((date == pl.col("date")).all() & (hour == pl.col("hourmin")).all()).item()
    play, duration = pl.col("play_time_ms"), pl.col("duration_ms")
    rules = {
        "is_click": pl.when(duration <= 7_000).then(play >= duration).otherwise(play > 7_000),
        "long_view": pl.when(duration <= 18_000).then(play >= duration).otherwise(play >= 18_000),
        "complete": play >= duration,
        "replay": play >= 2 * duration,
        "skip": play < 3_000,
        "comment_stay": pl.col("comment_stay_time") > 0,
        "is_profile_enter": pl.col("profile_stay_time") > 0,
    }
    for name, rule in rules.items():
        assert log.select((rule.cast(pl.Int8) == pl.col(name)).all()).item(), name


def test_positions_count_the_rows_of_a_session(feed):
    ordered = feed.log.sort("user_id", "time_ms").select("user_id", "position", "time_ms")
    starts = ordered["position"] == 0
    overlapping = ~(starts | (ordered["position"] == ordered["position"].shift(1) + 1))
    assert overlapping.mean() < 0.05  # two sessions of one user at the same time
    gaps = ordered["time_ms"].diff().filter(~(starts | overlapping))
    assert gaps.mean() == pytest.approx(1000 * GAP_S, rel=0.1)


def test_videos_are_shown_after_their_upload_and_by_popularity(feed):
    uploaded = feed.videos.select(
        pl.col("video_id").cast(pl.Int32),
        upload=pl.col("upload_dt").str.replace_all("-", "").cast(pl.Int32),
    )
    log = feed.log.join(uploaded, on="video_id", how="left")
    assert (log["upload"] <= log["date"]).all()
    assert (uploaded["upload"] > 20220408).mean() == pytest.approx(0.28, abs=0.05)
    counts = log["video_id"].value_counts()["count"].sort(descending=True)
    assert counts[: len(counts) // 10].sum() > 0.3 * len(log)
    assert log["is_rand"].mean() == pytest.approx(0.0037, abs=0.0007)
    random = log.filter(pl.col("is_rand") == 1)
    assert random["video_id"].n_unique() > 0.85 * len(random)


def test_the_value_of_the_uniform_policy_is_found_by_inverse_propensity(feed):
    """Weighted rewards of the log estimate the uniform policy; unweighted ones do not."""
    world, task = feed.world, TASKS.index("long_view")
    parts = list(world.stream(120_000, policy="uniform"))
    value = np.concatenate([p.truth for p in parts])[:, task].mean(dtype=float)
    log = feed.log.filter(pl.col("is_rand") == 0)
    weight = 1 / (50 * log["propensity"].to_numpy())
    y = log["long_view"].to_numpy()
    estimate = (weight * y).sum() / weight.sum()
    error = np.sqrt((weight**2 * (y - estimate) ** 2).sum()) / weight.sum()
    assert abs(estimate - value) < 4 * error
    assert y.mean() - value > 10 * error


def test_of_two_tastes_the_larger_affinity_counts():
    two = simulate(30_000, 900, 700, seed=8, interests=2)
    one = simulate(1_000, 900, 700, seed=8)
    tastes = two.world.hidden.users.tastes
    assert len(tastes) == 2
    np.testing.assert_array_equal(tastes[0], one.world.hidden.users.tastes[0])
    assert_frame_equal(two.users, one.users)
    assert abs(np.corrcoef(tastes[0].ravel(), tastes[1].ravel())[0, 1]) < 0.05
    user, video = np.arange(700), np.arange(700)
    known = two.world.hidden.factors(3)
    fits = np.stack([(taste[user] * known[video]).sum(1) for taste in tastes])
    affinity = fits.max(0) + two.world.hidden.videos.bias + two.world.hidden.users.bias[user]
    np.testing.assert_allclose(two.world._raw_affinity(user, video, 3), affinity, atol=1e-5)
    y, p = labels(two.log), two.truth.astype(np.float64)
    assert statistics(y, p).max() < chi2.ppf(1 - 1e-4, 10)
    np.testing.assert_allclose(p[:, :5].mean(0), WATCH_RATES, atol=0.05)


def test_groups_depend_on_different_things():
    """Watching ignores styles and tabs, interactions ignore hour, position and duration."""
    feed = simulate(rows=2_000, users=50, videos=100, seed=1, groups=True)
    truth = oracle(feed.world, feed.log.with_columns(tab=pl.lit(4, pl.Int8)))
    np.testing.assert_array_equal(truth[:, :5], feed.truth[:, :5])
    assert (truth[:, 5:] != feed.truth[:, 5:]).mean() > 0.5
    truth = oracle(feed.world, feed.log.with_columns(position=pl.col("position") + 20))
    np.testing.assert_array_equal(truth[:, 5:], feed.truth[:, 5:])
    assert (truth[:, :5] != feed.truth[:, :5]).mean() > 0.9


def test_counts_of_the_stress_setting_are_heavy_tailed():
    plain = simulate(rows=8_000, users=500, videos=500, seed=2)
    feed = simulate(rows=8_000, users=500, videos=500, seed=2, heavy_counts=True)
    names = ["user_play_count", "user_fan_count", "video_show_count", "video_comment_count"]
    assert_frame_equal(feed.log.drop(names), plain.log)
    for name in names:
        assert feed.log[name].max() > 8 * feed.log[name].median()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"videos": 10}, "videos must be at least 50"),
        ({"days": 0}, "days must be at least 1"),
        ({"rows": 0}, "rows must be at least 1"),
        ({"seed": -1}, "seed must not be negative"),
    ],
)
def test_small_worlds_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        simulate(**{"rows": 100, "users": 10, "videos": 60} | wrong)


def test_an_unknown_policy_is_refused():
    with pytest.raises(GatesError, match="policy is 'greedy'; choose one of logged, uniform"):
        simulate(rows=100, users=10, videos=60, policy="greedy")


def test_fewer_rows_than_days_are_refused():
    with pytest.raises(GatesError, match="25 rows are fewer than 30 days: simulate more rows"):
        simulate(25, 50, 60, 30)
    assert simulate(20, 50, 60, 20).log["date"].n_unique() == 20
