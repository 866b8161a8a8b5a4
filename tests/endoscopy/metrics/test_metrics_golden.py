from pathlib import Path

import numpy as np
import pytest

from endoscopy.metrics import (
    CONTINUOUS,
    PUBLISHED,
    TRUTH,
    accuracy,
    at_cut_off,
    balanced_accuracy,
    confusion_matrix,
    positive_predictive_value,
    sensitivity,
    specificity,
    weighted_f1,
)

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


def test_what_was_published_as_specificity_is_mean_precision():
    matrix = at_cut_off(confusion_matrix(TRUTH.classes(GT), CONTINUOUS.classes(PREDICTED)), 10)
    as_coded = published_scores(matrix)["specificity_as_coded"]
    assert as_coded == pytest.approx(positive_predictive_value(matrix).mean())
    true_specificity = specificity(matrix)[1]
    assert true_specificity == pytest.approx(sensitivity(matrix)[0])
    assert abs(true_specificity - as_coded) > 0.01
