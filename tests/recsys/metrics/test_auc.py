import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from core_gates.errors import GatesError
from recsys.metrics import auc

ROWS = st.lists(
    st.tuples(st.integers(-3, 3), st.booleans(), st.floats(0.1, 5)), min_size=2, max_size=40
)


@given(ROWS)
def test_equals_scikit_learn_with_ties_and_weights(rows):
    scores, labels, weights = map(np.array, zip(*rows, strict=True))
    found = auc(scores, labels, weights)
    if labels.all() or not labels.any():
        assert math.isnan(found.value)
        assert found.reason == ("no negative row" if labels.all() else "no positive row")
    else:
        expected = roc_auc_score(labels, scores, sample_weight=weights)
        assert found.value == pytest.approx(expected, abs=1e-12)
        assert found.reason == ""


def test_many_rows_equal_scikit_learn():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=100_000).round(3)
    labels, weights = rng.random(100_000) < 0.03, rng.random(100_000)
    expected = roc_auc_score(labels, scores, sample_weight=weights)
    assert auc(scores, labels, weights).value == pytest.approx(expected, abs=1e-12)
    assert auc(scores, labels).value == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


def test_infinite_scores_are_ranks():
    assert auc([-np.inf, 0.0, 0.0, np.inf], [0, 1, 0, 1]).value == 0.875


def test_rows_without_weight_are_no_rows():
    assert auc([1, 2], [0, 1], [1, 0]).reason == "no positive row"
    assert auc([], []).reason == "no row"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (([0.1, np.nan], [0, 1]), "1 of 2 scores are NaN; leave out rows without one"),
        (([0.1, 0.2], [0, 2]), "1 of 2 labels are neither 0 nor 1; mask rows without a label"),
        (([0.1, 0.2], [0, np.nan]), "1 of 2 labels are neither 0 nor 1"),
        (([0.1, 0.2], [0, 1], [1, -1]), "weights must be finite and not negative"),
        (([0.1, 0.2], [0, 1, 1]), "must have one length"),
        (([[0.1, 0.2]], [[0, 1]]), r"scores have shape \(1, 2\), expected one per row"),
    ],
)
def test_faults(arguments, line):
    with pytest.raises(GatesError, match=line):
        auc(*arguments)
