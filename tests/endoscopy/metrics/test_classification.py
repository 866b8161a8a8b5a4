from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn import metrics as sk

from endoscopy.metrics import (
    CONTINUOUS,
    PUBLISHED,
    TRUTH,
    CutOffs,
    accuracy,
    at_cut_off,
    balanced_accuracy,
    confusion_matrix,
    count_on_cut_offs,
    expected_calibration_error,
    f1,
    has_known_class,
    macro_f1,
    negative_predictive_value,
    positive_predictive_value,
    quadratic_kappa,
    reliability,
    sensitivity,
    specificity,
    weighted_f1,
)

MIDPOINTS = CutOffs(5.5, 9.5)  # of sizes in whole millimeters


def test_the_cut_offs_belong_to_the_outer_classes():
    assert TRUTH.classes([0.5, 5, 5.0001, 9.9999, 10, 30]).tolist() == [0, 0, 1, 1, 2, 2]
    assert MIDPOINTS.classes([5, 5.5, 6, 9, 9.5, 10]).tolist() == [0, 0, 1, 1, 2, 2]
    assert CutOffs(5, 10).classes([[4], [20]]).tolist() == [[0], [2]]


def test_objects_on_the_cut_offs_are_counted():
    assert count_on_cut_offs([5, 5, 4.99, 10, 9.9, 3]) == {5: 2, 10: 1}


def test_a_lower_bound_tells_the_class_only_when_large():
    known = has_known_class([3, 3, 10, 15, 9.5], [False, True, True, True, False])
    assert known.tolist() == [True, False, True, True, True]


@pytest.mark.parametrize("bad", [(0, 10), (10, 5), (5, 5), (5, np.inf), (np.nan, 10)])
def test_bad_cut_offs(bad, refused):
    refused("ascending", CutOffs, *bad, error=ValueError)


def test_a_size_that_is_no_number_is_not_large(refused):
    refused("1 of 3 sizes are NaN", TRUTH.classes, [1, np.nan, 3])


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


@pytest.mark.parametrize("predicted", [[0, 1], [0, 1, 3], [0, 1, -1]])
def test_bad_classes(predicted, refused):
    refused(
        r"one length|expected",
        confusion_matrix,
        np.array([0, 1, 2]),
        np.array(predicted),
        error=ValueError,
    )


def test_closed_form():
    probabilities = np.array([[0.8, 0.2, 0.0]] * 10 + [[0.0, 0.4, 0.6]] * 10)
    truth = np.array([0] * 8 + [1] * 2 + [2] * 10)
    assert expected_calibration_error(probabilities, truth) == pytest.approx(0.5 * 0.4)
    weighted = expected_calibration_error(probabilities, truth, weights=np.repeat([1.0, 0.0], 10))
    assert weighted == pytest.approx(0)
    bins = [[0.5, 0.6, 10, 0.6, 1], [0.7, 0.8, 10, 0.8, 0.8]]
    np.testing.assert_allclose(reliability(probabilities, truth), bins)


def test_rows_must_be_distributions(refused):
    refused("sum to one", reliability, np.full((3, 3), 0.5), np.zeros(3), error=ValueError)


GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "endoscopy" / "metrics_s71.npz")
GT, PREDICTED = GOLDEN["gt_mm"], GOLDEN["pred_mm"]


def published_scores(matrix):
    """The eight numbers of the published evaluation; its specificity is the mean precision."""
    precision, support = np.nan_to_num(positive_predictive_value(matrix)), matrix.sum(-1)
    recall = balanced_accuracy(matrix)
    as_coded = precision[(support + matrix.sum(-2)) > 0].mean()
    return {
        "sensitivity": recall,
        "specificity_as_coded": as_coded,
        "balanced_perf": (recall + as_coded) / 2,
        "precision_weighted": (precision * support).sum() / support.sum(),
        "recall_weighted": accuracy(matrix),
        "f1_weighted": weighted_f1(matrix),
        "balanced_accuracy": recall,
        "accuracy": accuracy(matrix),
    }


def test_classes_match_the_published_strings():
    names = np.array(["Dim", "Small", "Large"])
    assert (names[TRUTH.classes(GT)] == GOLDEN["tri_gt"]).all()
    assert (names[PUBLISHED.classes(PREDICTED)] == GOLDEN["tri_pred_475"]).all()
    assert ((TRUTH.classes(GT) == 2) == (GOLDEN["bin_gt"] == "Large")).all()


@pytest.mark.parametrize(("key", "cut_offs"), [("tri_475", PUBLISHED), ("tri_5", CONTINUOUS)])
def test_three_classes(key, cut_offs):
    scores = published_scores(confusion_matrix(TRUTH.classes(GT), cut_offs.classes(PREDICTED)))
    assert list(scores) == GOLDEN["names"].tolist()
    np.testing.assert_allclose(list(scores.values()), GOLDEN[key], rtol=1e-9)


def test_two_classes():
    matrix = confusion_matrix(TRUTH.classes(GT), CONTINUOUS.classes(PREDICTED))
    scores = published_scores(at_cut_off(matrix, 10))
    np.testing.assert_allclose(list(scores.values()), GOLDEN["binary"], rtol=1e-9)
