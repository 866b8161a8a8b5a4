import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn import metrics as sk

from core_gates.errors import GatesError
from endoscopy.metrics import (
    auroc,
    bias,
    confusion_matrix,
    limits_of_agreement,
    mean_absolute_error,
    mean_relative_error,
    root_mean_square_error,
    size_auroc,
)

sizes = arrays(float, 30, elements=st.floats(0.5, 30))
SCORES = (mean_absolute_error, root_mean_square_error, mean_relative_error, bias)


@given(sizes, sizes)
def test_agreement_with_scikit_learn(gt, predicted):
    assert mean_absolute_error(gt, predicted) == pytest.approx(
        sk.mean_absolute_error(gt, predicted)
    )
    assert root_mean_square_error(gt, predicted) == pytest.approx(
        sk.root_mean_squared_error(gt, predicted)
    )
    assert mean_relative_error(gt, predicted) == pytest.approx(
        sk.mean_absolute_percentage_error(gt, predicted)
    )


@given(sizes, sizes, arrays(np.int64, (3, 30), elements=st.integers(0, 3)))
def test_weights_are_repetitions(gt, predicted, counts):
    counts[:, :2] += 1
    for score in (*SCORES, lambda *a: np.stack(limits_of_agreement(*a))):
        together = score(gt, predicted, counts.astype(float))
        apart = [score(gt.repeat(c), predicted.repeat(c)) for c in counts]
        np.testing.assert_allclose(together, np.stack(apart, -1), atol=1e-6)


def test_signs_do_not_cancel_but_in_the_bias():
    gt, predicted = np.array([4.0, 8.0]), np.array([5.0, 7.0])
    assert (bias(gt, predicted), mean_absolute_error(gt, predicted)) == (0, 1)
    assert mean_absolute_error([1, 2], [2, 5]) == 2  # lists are scored like arrays
    assert mean_relative_error(gt, predicted) == pytest.approx((1 / 4 + 1 / 8) / 2)
    assert bias(gt, predicted + 2) == 2


def test_limits_hold_95_percent_of_normal_errors():
    draws = np.random.default_rng(0)
    gt = draws.uniform(2, 20, 20_000)
    error = draws.normal(0.3, 0.8, 20_000)
    limits = limits_of_agreement(gt, gt + error)
    assert limits.bias == pytest.approx(0.3, abs=0.02)
    assert ((error > limits.low) & (error < limits.high)).mean() == pytest.approx(0.95, abs=0.005)
    three = limits_of_agreement(np.zeros(3), np.array([-1.0, 0.0, 1.0]))
    assert three.high == pytest.approx(1.96, abs=1e-3)  # the deviation is that of a sample


scores = arrays(float, 30, elements=st.integers(0, 8).map(float))
flags = arrays(bool, 30)


@given(scores, flags, arrays(np.int64, (3, 30), elements=st.integers(0, 3)))
def test_auroc_agrees_with_scikit_learn(score, positive, counts):
    together = auroc(score, positive, counts.astype(float))
    for value, count in zip(together, counts, strict=True):
        left = positive.repeat(count)
        if left.all() or not left.any():
            assert np.isnan(value)
        else:
            assert value == pytest.approx(sk.roc_auc_score(left, score.repeat(count)))


def test_sizes_on_the_cut_offs():
    gt = np.array([5.0, 5.1, 9.9, 10.0])
    assert size_auroc(gt, np.array([0.0, 1, 1, 1]), 5) == 1
    assert size_auroc(gt, np.array([0.0, 0, 0, 1]), 10) == 1


@pytest.mark.fault("faults 8")
def test_a_score_that_is_no_number_has_no_rank(refuses):
    refuses(
        GatesError,
        (
            "1 of 3 scores are NaN; leave out rows without one",
            lambda: auroc(np.array([0.2, np.nan, 0.4]), np.array([False, False, True])),
        ),
        ("1 of 2 scores are NaN", lambda: size_auroc([3.0, 8.0], [4.0, np.nan], 5)),
    )


@pytest.mark.fault("faults 8")
def test_nothing_has_an_empty_confusion_matrix_and_no_score(refused):
    assert confusion_matrix([], []).tolist() == [[0.0] * 3] * 3
    assert np.isnan(auroc([], []))
    assert np.isnan(auroc([], [], np.ones((4, 0)))).tolist() == [True] * 4
    assert np.isnan(mean_absolute_error([], []))
    refused("must have one length", auroc, [0.1], [True, False], error=ValueError)
