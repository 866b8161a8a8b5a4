"""Where a search tries settings."""

import math

import pytest

from core_gates.errors import GatesError
from harness.experiment.tuning import (
    BEYOND,
    QUARTER,
    check_space,
    edges_of,
    first_trials,
    more_trials,
)

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


@pytest.mark.fault("46 WEATHER")
def test_a_search_stays_within_limits_and_at_the_best_of_a_choice_of_values():
    space = {"fraction": (0.1, 0.9, 1.0), "which": [1, 2, 5]}
    first = first_trials(space, 48, seed=3)
    assert {setting["which"] for setting in first} == {1, 2, 5}
    best = {"fraction": 0.87, "which": 5}
    more = more_trials(space, 48, 3, best)
    assert (len(more), {setting["which"] for setting in more}) == (18, {5})
    fractions = [setting["fraction"] for setting in more]
    assert max(fractions) <= 1
    assert max(fractions) > 0.9
    tried = [*first, *more, {"fraction": 0.99, "which": 5}]
    assert edges_of(space, tried, len(tried) - 1) == []
    assert edges_of({"fraction": (0.1, 0.9)}, tried, len(tried) - 1) == ["fraction"]


@pytest.mark.fault("46 WEATHER")
def test_a_limit_below_the_edges_is_refused():
    with pytest.raises(GatesError, match=r"fraction of oi is searched from 0\.1 to 0\.9 to 0\.5: "):
        check_space("oi", {"fraction": (0.1, 0.9, 0.5)}, 8)
