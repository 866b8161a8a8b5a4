import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from core_gates.errors import GatesError
from recsys.metrics import gauc, user_auc

ROWS = st.lists(
    st.tuples(
        st.integers(-2, 2), st.booleans(), st.sampled_from("abcd"), st.sampled_from([0.5, 1, 3])
    ),
    min_size=1,
    max_size=40,
)


def by_loop(scores, labels, users, weights):
    """Both means by their definition, one user after the other."""
    areas, sizes, excluded = [], [], 0
    for user in sorted(set(users)):
        rows = users == user
        if len(set(labels[rows])) < 2:
            excluded += 1
            continue
        areas.append(roc_auc_score(labels[rows], scores[rows], sample_weight=weights[rows]))
        sizes.append(weights[rows].sum())
    return areas, sizes, excluded


@given(ROWS)
def test_equals_a_loop_over_users(rows):
    scores, labels, users, weights = map(np.array, zip(*rows, strict=True))
    areas, sizes, excluded = by_loop(scores, labels, users, weights)
    found = gauc(scores, labels, users, weights)
    assert (found.users, found.excluded) == (len(areas), excluded)
    if areas:
        assert found.weighted == pytest.approx(np.average(areas, weights=sizes), abs=1e-12)
        assert found.mean == pytest.approx(np.mean(areas), abs=1e-12)
    else:
        assert math.isnan(found.weighted)
        assert found.reason == "no user has both classes"


def test_the_conventions_differ():
    users = np.repeat([7, 3], [8, 2])
    labels = np.array([0, 0, 0, 0, 0, 0, 0, 1, 0, 1])
    scores = np.arange(10.0)
    scores[8:] = 1, 0
    found = gauc(scores, labels, users)
    assert (found.weighted, found.mean) == (0.8, 0.5)
    assert user_auc(scores, labels, users).users.tolist() == [3, 7]


@given(st.permutations(range(12)))
def test_the_order_of_rows_does_not_matter(order):
    rng = np.random.default_rng(1)
    scores, labels = rng.integers(0, 3, 12), rng.integers(0, 2, 12)
    users, order = rng.integers(0, 3, 12), np.array(order)
    assert gauc(scores[order], labels[order], users[order]) == gauc(scores, labels, users)


def test_scores_of_users_are_never_compared():
    rng = np.random.default_rng(2)
    users, labels = rng.integers(0, 50, 1000), rng.integers(0, 2, 1000)
    scores = rng.normal(size=1000)
    shifted = scores + 1e3 * users
    assert gauc(shifted, labels, users) == gauc(scores, labels, users)


def test_a_million_rows_take_less_than_two_seconds():
    rng = np.random.default_rng(3)
    scores, labels = rng.normal(size=10**6), rng.integers(0, 2, 10**6)
    users = rng.integers(0, 50_000, 10**6)
    start = time.process_time()
    found = gauc(scores, labels, users)
    assert time.process_time() - start < 2
    assert found.weighted == pytest.approx(0.5, abs=0.01)


def test_faults():
    with pytest.raises(GatesError, match=r"users have shape \(3,\), expected one for each of 2"):
        gauc([0.1, 0.2], [0, 1], [1, 2, 3])
    assert gauc([], [], np.zeros(0, dtype=int)).reason == "no user has both classes"
