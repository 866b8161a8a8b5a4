import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss as of_scikit_learn

from core_gates.errors import GatesError
from recsys.metrics import log_loss, normalized_entropy
from recsys.metrics.probabilities import entropy

ROWS = st.lists(
    st.tuples(st.floats(0.001, 0.999), st.booleans(), st.floats(0.1, 5)), min_size=1, max_size=30
)


@given(ROWS)
def test_equals_scikit_learn(rows):
    probs, labels, weights = map(np.array, zip(*rows, strict=True))
    expected = of_scikit_learn(labels, probs, sample_weight=weights, labels=[False, True])
    assert log_loss(probs, labels, weights).value == pytest.approx(expected, rel=1e-12)


def test_certain_and_wrong_is_finite():
    assert log_loss([1.0], [0]).value == pytest.approx(-math.log(1e-7))
    assert log_loss([1.0], [1]).value == pytest.approx(1e-7, rel=1e-3)


def test_the_base_rate_has_normalized_entropy_one():
    labels = np.array([1, 0, 0, 0, 1])
    assert normalized_entropy(np.full(5, 0.4), labels).value == pytest.approx(1, abs=1e-12)
    weights = np.array([2, 1, 1, 1, 3.0])
    assert normalized_entropy(np.full(5, 5 / 8), labels, weights).value == pytest.approx(1)
    assert normalized_entropy(np.full(5, 0.5), labels).value > 1
    assert normalized_entropy([0.9, 0.1, 0.1, 0.1, 0.9], labels).value < 0.2


def test_without_a_class_there_is_no_base_rate():
    assert normalized_entropy([0.2], [0]).reason == "no positive row"
    assert log_loss([], []).reason == "no row"
    assert log_loss([0.2], [0]).value == pytest.approx(-math.log(0.8))


def test_entropy_of_certainty_is_zero():
    assert entropy([0, 0.5, 1]).tolist() == pytest.approx([0, math.log(2), 0])
    assert np.isnan(entropy(np.nan))


def test_logits_are_refused():
    with pytest.raises(GatesError, match=r"found -2 to 0.5; apply the sigmoid to logits first"):
        log_loss([-2.0, 0.5], [0, 1])
