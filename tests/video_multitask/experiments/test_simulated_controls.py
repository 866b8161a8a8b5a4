import json

import numpy as np
import polars as pl
import pytest

from core_gates.errors import GatesError
from video_multitask.feed import LABELS
from video_multitask.simulated_controls import (
    Redrawn,
    rate_bars,
    rate_rows,
    rates_of,
    redraw,
    redrawn_bars,
    redrawn_rows,
)
from video_multitask.simulator.hidden import BASE_RATES, TASKS
from video_multitask.sources.simulated import TRUTH, SimulatedFeed


@pytest.fixture(scope="module")
def world():
    return SimulatedFeed(users=400, videos=300, days=3, validation_days=1, test_days=1).world()


@pytest.fixture(scope="module")
def found(world):
    return redraw(world, logs=40, rows=1_500, truth_rows=60_000)


def test_intervals_hold_the_truth_and_the_mean_of_the_log_does_not(found):
    weighted, plain = found.covered(found.weighted), found.covered(found.plain)
    assert weighted.min() >= 0.85
    assert (plain[0], [bar.met for bar in redrawn_bars(found)]) == (0, [True, True])
    assert not any(bar.met for bar in redrawn_bars(found._replace(weighted=found.plain)))


def test_estimates_scatter_around_the_truth_as_their_intervals_say(found):
    values = found.weighted[..., 0]
    spread = values.std(0, ddof=1)
    np.testing.assert_array_less(np.abs(values.mean(0) - found.truth), 4 * spread / np.sqrt(40))
    np.testing.assert_allclose((found.weighted[..., 2] - values).mean(0) / 1.96, spread, rtol=0.3)


def test_the_truth_is_the_mean_true_probability_of_a_log_of_the_policy(world, found):
    parts = [chunk.truth for chunk in world.stream(60_000, draw=40, policy="uniform")]
    truth = np.concatenate(parts).mean(0, dtype=float)
    np.testing.assert_allclose(found.truth, truth[[0, TASKS.index("like")]], rtol=1e-9)


def test_rows_count_the_logs_and_figures_survive_a_file(found):
    rows = redrawn_rows(Redrawn.of(json.loads(json.dumps(found.figures()))), group="controls")
    assert rows == redrawn_rows(Redrawn.of(found.figures()), group="controls")
    by = {(row.method, row.metric): row for row in rows}
    held = by["SNIPS, effective_view", "coverage"]
    assert (held.value, held.n) == (found.covered(found.weighted)[0], 40)
    assert by["SNIPS, like", "effective rows"].value == pytest.approx(found.effective.mean())
    assert 500 < found.effective.min() < found.effective.max() < 1_500


def test_an_unknown_task_is_refused(world):
    with pytest.raises(GatesError, match="task is 'share'"):
        redraw(world, ("share",), logs=1, rows=10, truth_rows=10)


@pytest.fixture(scope="module")
def log():
    tables = SimulatedFeed(rows=30_000, users=600, videos=500, days=6, seed=2).read()
    return pl.concat([tables.train, tables.validation, tables.test])


def test_a_simulated_log_has_the_rates_of_its_world(log):
    rates = rates_of(log)
    assert [one.task for one in rates] == list(LABELS)
    bars = rate_bars(rates)
    assert [bar.name for bar in bars if not bar.met] == []
    assert len(bars) == len(rate_rows(rates, group="controls")) == 14


def test_rates_are_means_of_labels_and_of_true_probabilities():
    truth = {f"{TRUTH}{task}": [rate, rate * 1.4] for task, rate in BASE_RATES.items()}
    columns = {column: [0, 1] for column in LABELS.values()}
    rates = {one.task: one for one in rates_of(pl.DataFrame({**columns, **truth}))}
    assert {rates[task].value for task in list(LABELS)[:5]} == {0.5}
    assert rates["like"].value == pytest.approx(1.2 * BASE_RATES["like"])
    bars = {bar.name: bar for bar in rate_bars(list(rates.values()))}
    exact = bars["world: rate of effective_view − 0.54, either way"]
    assert (exact.value, exact.bar, exact.met) == (pytest.approx(0.04), 0.04, exact.value <= 0.04)
    assert not bars["world: rate of skip − 0.24, either way"].met
    like = bars["world: mean true probability of like / 0.03 − 1, either way"]
    assert (like.value, like.bar, like.met) == (pytest.approx(0.2), 0.1, False)


def test_a_log_of_another_policy_does_not(log):
    """Rows of the least liked videos have other rates."""
    bars = rate_bars(rates_of(log.sort(f"{TRUTH}long_view").head(len(log) // 2)))
    assert sum(bar.met for bar in bars) <= 2
