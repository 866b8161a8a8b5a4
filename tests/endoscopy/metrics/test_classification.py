import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn import metrics as sk

from endoscopy.metrics import (
    accuracy,
    at_cut_off,
    balanced_accuracy,
    confusion_matrix,
    f1,
    macro_f1,
    negative_predictive_value,
    positive_predictive_value,
    quadratic_kappa,
    sensitivity,
    specificity,
    weighted_f1,
)

classes = arrays(np.int64, 40, elements=st.integers(0, 2))


@given(classes, classes)
def test_agreement_with_scikit_learn(truth, predicted):
    matrix = confusion_matrix(truth, predicted)
    np.testing.assert_array_equal(matrix, sk.confusion_matrix(truth, predicted, labels=[0, 1, 2]))
    assert accuracy(matrix) == pytest.approx(sk.accuracy_score(truth, predicted))
    assert macro_f1(matrix) == pytest.approx(sk.f1_score(truth, predicted, average="macro"))
    assert weighted_f1(matrix) == pytest.approx(sk.f1_score(truth, predicted, average="weighted"))
    recalls = sk.recall_score(
        truth, predicted, average=None, labels=[0, 1, 2], zero_division=np.nan
    )
    np.testing.assert_allclose(sensitivity(matrix), recalls)
    assert balanced_accuracy(matrix) == pytest.approx(np.nanmean(recalls))
    np.testing.assert_allclose(
        positive_predictive_value(matrix),
        sk.precision_score(truth, predicted, average=None, labels=[0, 1, 2], zero_division=np.nan),
    )
    if len(set(truth) | set(predicted)) > 1:
        expected = sk.cohen_kappa_score(truth, predicted, labels=[0, 1, 2], weights="quadratic")
        assert quadratic_kappa(matrix) == pytest.approx(expected, abs=1e-12)


@given(classes, classes, arrays(np.int64, (4, 40), elements=st.integers(0, 3)))
def test_weights_are_repetitions(truth, predicted, counts):
    matrices = confusion_matrix(truth, predicted, weights=counts.astype(float))
    for matrix, count in zip(matrices, counts, strict=True):
        repeated = confusion_matrix(truth.repeat(count), predicted.repeat(count))
        np.testing.assert_array_equal(matrix, repeated)
    for score in (macro_f1, weighted_f1, balanced_accuracy, quadratic_kappa, specificity):
        np.testing.assert_allclose(score(matrices), [score(matrix) for matrix in matrices])


@given(classes, classes)
def test_one_class_against_the_rest(truth, predicted):
    matrix = confusion_matrix(truth, predicted)
    for k in range(3):
        two = confusion_matrix(truth == k, predicted == k, num_classes=2)
        np.testing.assert_allclose(specificity(matrix)[k], sensitivity(two)[0])
        np.testing.assert_allclose(
            negative_predictive_value(matrix)[k], positive_predictive_value(two)[0]
        )
    at5 = confusion_matrix(truth > 0, predicted > 0, num_classes=2)
    np.testing.assert_array_equal(at_cut_off(matrix, 5), at5)
    at10 = confusion_matrix(truth > 1, predicted > 1, num_classes=2)
    np.testing.assert_array_equal(at_cut_off(matrix, 10), at10)


def test_a_class_that_never_occurs_does_not_count():
    matrix = confusion_matrix(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 0]))
    assert macro_f1(matrix) == pytest.approx((0.8 + 2 / 3) / 2)
    assert np.isnan(f1(matrix)[2])
    assert balanced_accuracy(matrix) == pytest.approx(0.75)


def test_far_mistakes_cost_more_in_kappa():
    near = confusion_matrix(np.array([0, 0, 1, 2, 2]), np.array([0, 1, 1, 2, 2]))
    far = confusion_matrix(np.array([0, 0, 1, 2, 2]), np.array([0, 2, 1, 2, 2]))
    assert quadratic_kappa(far) < quadratic_kappa(near) < 1


@pytest.mark.parametrize("predicted", [[0, 1], [0, 1, 3], [0, 1, -1]])
def test_bad_classes(predicted):
    with pytest.raises(ValueError, match=r"one length|expected"):
        confusion_matrix(np.array([0, 1, 2]), np.array(predicted))
