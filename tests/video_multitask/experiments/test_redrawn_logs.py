import json

import numpy as np
import pytest

from core_gates.errors import GatesError
from video_multitask.experiments.redrawn_logs import Redrawn, redraw, redrawn_bars, redrawn_rows
from video_multitask.simulator.settings import TASKS
from video_multitask.sources.simulated import SimulatedFeed


@pytest.fixture(scope="module")
def world():
    return SimulatedFeed(users=400, videos=300, days=3, validation_days=1, test_days=1).world()


@pytest.fixture(scope="module")
def found(world):
    return redraw(world, logs=40, rows=1_500, truth_rows=60_000)


def test_intervals_hold_the_truth_and_the_mean_of_the_log_does_not(found):
    weighted, plain = found.covered(found.weighted), found.covered(found.plain)
    assert weighted.min() >= 0.85
    assert plain[0] == 0
    assert [bar.met for bar in redrawn_bars(found)] == [True, True]
    unweighted = found._replace(weighted=found.plain)
    assert not any(bar.met for bar in redrawn_bars(unweighted))


def test_estimates_scatter_around_the_truth_as_their_intervals_say(found):
    values = found.weighted[..., 0]
    spread = values.std(0, ddof=1)
    np.testing.assert_array_less(np.abs(values.mean(0) - found.truth), 4 * spread / np.sqrt(40))
    reach = (found.weighted[..., 2] - values).mean(0) / 1.96
    np.testing.assert_allclose(reach, spread, rtol=0.3)


def test_the_truth_is_the_mean_true_probability_of_a_log_of_the_policy(world, found):
    parts = [chunk.truth for chunk in world.stream(60_000, draw=40, policy="uniform")]
    truth = np.concatenate(parts).mean(0, dtype=float)
    np.testing.assert_allclose(found.truth, truth[[0, TASKS.index("like")]], rtol=1e-9)


def test_rows_count_the_logs_and_figures_survive_a_file(found):
    again = Redrawn.of(json.loads(json.dumps(found.figures())))
    rows = redrawn_rows(again, group="controls")
    assert rows == redrawn_rows(Redrawn.of(found.figures()), group="controls")
    by = {(row.method, row.metric): row for row in rows}
    held = by["SNIPS, effective_view", "coverage"]
    assert (held.value, held.n) == (found.covered(found.weighted)[0], 40)
    assert by["SNIPS, like", "effective rows"].value == pytest.approx(found.effective.mean())
    assert 500 < found.effective.min() < found.effective.max() < 1_500


def test_an_unknown_task_is_refused(world):
    with pytest.raises(GatesError, match="task is 'share'"):
        redraw(world, ("share",), logs=1, rows=10, truth_rows=10)
