"""Where a search tries settings."""

import math

import pytest

from harness.experiment.tuning import BEYOND, QUARTER, first_trials, more_trials

SIDE = (1.0, math.e)
SPACE = {"a": SIDE, "b": SIDE}


def places(settings):
    return [[math.log(setting[name]) for name in SPACE] for setting in settings]


@pytest.mark.parametrize(
    ("best", "low", "width"),
    [(0.5, 0.5 - QUARTER / 2, QUARTER), (0.0, -BEYOND, BEYOND + QUARTER / 2)],
    ids=["inside", "at an edge"],
)
def test_later_trials_lie_around_the_best_and_are_no_repetition_of_the_first(best, low, width):
    first = places(first_trials(SPACE, 16, seed=3))
    more = places(more_trials(SPACE, 16, 3, dict.fromkeys(SPACE, math.exp(best))))
    assert (len(first), len(more)) == (10, 6)
    within = [[(place - low) / width for place in point] for point in more]
    assert all(0 <= place <= 1 for point in within for place in point)
    assert all(point != pytest.approx(other) for point in within for other in first)
