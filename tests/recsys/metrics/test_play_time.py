import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core_gates.errors import GatesError
from recsys.metrics import auc, gxauc, mean_absolute_error, user_xauc, xauc
from recsys.metrics.play_time import larger_before

ROWS = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 2)), min_size=1, max_size=25
)


def by_pairs(predicted, observed):
    right = pairs = 0.0
    for i, j in combinations(range(len(predicted)), 2):
        truth, guess = observed[i] - observed[j], predicted[i] - predicted[j]
        if truth:
            pairs += 1
            right += 0.5 if guess == 0 else truth * guess > 0
    return right / pairs if pairs else math.nan


@given(ROWS)
def test_equals_a_loop_over_pairs(rows):
    predicted, observed, users = map(np.array, zip(*rows, strict=True))
    found, expected = xauc(predicted, observed), by_pairs(predicted, observed)
    assert found.value == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert bool(found.reason) == math.isnan(expected)
    names = sorted(set(users))
    areas = [by_pairs(predicted[users == u], observed[users == u]) for u in names]
    assert user_xauc(predicted, observed, users).auc.tolist() == pytest.approx(areas, nan_ok=True)
    sizes = [(users == u).sum() for u, a in zip(names, areas, strict=True) if a == a]
    areas = [a for a in areas if a == a]
    grouped = gxauc(predicted, observed, users)
    assert (grouped.users, grouped.excluded) == (len(areas), len(names) - len(areas))
    if areas:
        assert grouped.mean == pytest.approx(np.mean(areas))
        assert grouped.weighted == pytest.approx(np.average(areas, weights=sizes))


@given(st.lists(st.integers(0, 300), max_size=60))
def test_larger_numbers_before_each(numbers):
    expected = [sum(a > b for a in numbers[:i]) for i, b in enumerate(numbers)]
    assert larger_before(np.array(numbers, dtype=int)).tolist() == expected


def test_of_two_observed_values_it_is_the_auc():
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=5000).round(2), rng.integers(0, 2, 5000)
    assert xauc(scores, labels).value == pytest.approx(auc(scores, labels).value, abs=1e-12)


def test_any_increasing_map_leaves_it():
    rng = np.random.default_rng(1)
    seconds = rng.lognormal(size=1000)
    guess = seconds * rng.lognormal(size=1000)
    assert xauc(np.log(guess), seconds**2) == xauc(guess, seconds)
    assert xauc(seconds, seconds).value == 1
    assert xauc(-seconds, seconds).value == 0


def test_mean_absolute_error():
    assert mean_absolute_error([1, 2, 3], [1, 4, 0]).value == pytest.approx(5 / 3)
    assert mean_absolute_error([1, 2, 3], [1, 4, 0], [0, 1, 3]).value == pytest.approx(11 / 4)
    assert mean_absolute_error([], []).reason == "no row"


def test_faults():
    with pytest.raises(GatesError, match=r"predicted \(2,\) and observed \(1,\)"):
        xauc([1, 2], [1])
    with pytest.raises(GatesError, match="must not be NaN"):
        mean_absolute_error([np.nan], [1])
    assert xauc([1, 2], [3, 3]).reason == "no two rows differ"
    assert gxauc([1, 2], [3, 3], [0, 0]).reason == "no user has two rows that differ"
    assert xauc([], []).reason == "no row"
