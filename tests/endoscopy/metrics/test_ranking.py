import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

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


@pytest.mark.fault("faults 8")
def test_a_score_that_is_no_number_has_no_rank():
    with pytest.raises(GatesError, match="1 of 3 scores are NaN; leave out rows without one"):
        auroc(np.array([0.2, np.nan, 0.4]), np.array([False, False, True]))
    with pytest.raises(GatesError, match="1 of 2 scores are NaN"):
        size_auroc([3.0, 8.0], [4.0, np.nan], 5)


@pytest.mark.fault("faults 8")
def test_lists_are_scored_like_arrays():
    score, positive = [0.1, 0.4, 0.35, 0.8, 0.4], [0, 0, 1, 1, 1]
    assert float(auroc(score, positive)) == pytest.approx(roc_auc_score(positive, score))
    assert float(mean_absolute_error([1, 2], [2, 5])) == 2.0
    assert float(root_mean_square_error([1, 2], [2, 5])) == pytest.approx(np.sqrt(5))
    assert float(mean_relative_error([1, 2], [2, 5])) == pytest.approx(1.25)
    assert float(bias([1, 2], [2, 1])) == 0.0
    limits = limits_of_agreement([1, 2], [2, 5])
    assert float(limits.bias) == 2.0
    assert float(limits.high - limits.low) == pytest.approx(2 * 1.959964 * np.sqrt(2), rel=1e-6)


@pytest.mark.fault("faults 8")
def test_nothing_has_an_empty_confusion_matrix_and_no_score():
    assert confusion_matrix([], []).tolist() == [[0.0] * 3] * 3
    assert np.isnan(auroc([], []))
    assert np.isnan(auroc([], [], np.ones((4, 0)))).tolist() == [True] * 4
    assert np.isnan(mean_absolute_error([], []))
    with pytest.raises(ValueError, match="must have one length"):
        auroc([0.1], [True, False])
