import polars as pl
import pytest

from video_multitask.experiments.world_rates import rate_bars, rate_rows, rates_of
from video_multitask.simulator.settings import BASE_RATES
from video_multitask.sources.simulated import TRUTH, SimulatedFeed
from video_multitask.tasks import LABELS


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
    few = log.sort(f"{TRUTH}long_view").head(len(log) // 2)
    bars = rate_bars(rates_of(few))
    assert sum(bar.met for bar in bars) <= 2
