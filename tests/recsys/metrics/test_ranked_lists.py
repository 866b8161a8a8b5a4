import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from core_gates.errors import GatesError
from recsys.metrics import ndcg_at, recall_at


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=2, max_size=12),
    st.integers(1, 5),
)
def test_ndcg_equals_scikit_learn_also_with_ties(rows, k):
    scores, gains = map(np.array, zip(*rows, strict=True))
    found = ndcg_at(k, scores, gains, np.zeros(len(rows)))
    if gains.any():
        assert found.value == pytest.approx(ndcg_score([gains], [scores], k=k), abs=1e-12)
    else:
        assert math.isnan(found.value)
        assert found[1:] == (0, 1)


def test_lists_are_averaged():
    lists = ["b", "a", "b", "a", "c", "b"]
    scores, labels = [1, 9, 3, 8, 5, 2], [1, 1, 0, 0, 0, 1]
    dcg = 1 / math.log2(3)
    assert ndcg_at(2, scores, labels, lists) == (pytest.approx((dcg / (1 + dcg) + 1) / 2), 2, 1)
    assert recall_at(2, scores, labels, lists) == (0.75, 2, 1)
    assert recall_at(3, scores, labels, lists).value == 1


def test_ties_are_the_mean_over_their_orders():
    scores, labels = np.array([2, 1, 1, 1, 0]), np.array([0, 1, 0, 0, 1])
    orders = [[0, *order, 4] for order in permutations([1, 2, 3])]
    expected = np.mean([labels[order][:2].sum() / 2 for order in orders])
    assert recall_at(2, scores, labels, np.zeros(5)).value == pytest.approx(expected)


def test_faults():
    with pytest.raises(ValueError, match="k must be at least 1"):
        ndcg_at(0, [1], [1], [1])
    with pytest.raises(GatesError, match="gains neither NaN nor negative"):
        ndcg_at(1, [1], [-1], [1])
    with pytest.raises(GatesError, match=r"must be \(N,\) both"):
        recall_at(1, [1, 2], [1], [1])
    assert ndcg_at(1, [], [], np.zeros(0)).lists == 0
