import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weather.experiments.tuning import search

BOX = {"scale": (0.01, 1.0), "length_km": (100.0, 5000.0)}


def distance(setting):
    return math.log(setting["scale"] / 0.1) ** 2 + math.log(setting["length_km"] / 1000) ** 2


def test_refinement_improves_on_the_wide_trials():
    gains = []
    for seed in range(20):
        values = []
        search(BOX, distance, seed=seed, report=lambda _n, _s, value, v=values: v.append(value))
        gains.append(min(values[5:]) / min(values[:5]))
    assert sum(gain < 0.7 for gain in gains) >= 10


def test_trials_are_counted_and_the_best_is_returned():
    seen = []
    setting, best = search(BOX, distance, report=lambda *trial: seen.append(trial))
    assert [number for number, *_ in seen] == list(range(8))
    assert (setting, best) == min((trial[1:] for trial in seen), key=lambda pair: pair[1])


@given(st.integers(0, 100), st.integers(1, 12))
def test_every_trial_lies_inside_the_box(seed, trials):
    inside = []

    def score(setting):
        inside.append(all(BOX[k][0] * 0.999 <= v <= BOX[k][1] * 1.001 for k, v in setting.items()))
        return distance(setting)

    search(BOX, score, trials=trials, seed=seed)
    assert len(inside) == trials
    assert all(inside)


def test_nan_never_wins():
    _, best = search(BOX, lambda s: math.nan if s["scale"] > 0.1 else s["scale"], trials=8)
    assert best <= 0.1


def test_the_same_seed_gives_the_same_setting():
    assert search(BOX, distance, seed=3) == search(BOX, distance, seed=3)
    assert search(BOX, distance, seed=3) != search(BOX, distance, seed=4)


@pytest.mark.parametrize("box", [{"a": (0.0, 1.0)}, {"a": (2.0, 1.0)}])
def test_wrong_boxes_are_refused(box):
    with pytest.raises(ValueError, match="a: need 0 < low <= high"):
        search(box, lambda _: 0.0)
