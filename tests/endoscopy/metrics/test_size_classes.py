import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from core_gates.errors import GatesError
from endoscopy.metrics import (
    CONTINUOUS,
    PUBLISHED,
    TRUTH,
    CutOffs,
    confusion_matrix,
    count_on_cut_offs,
    has_known_class,
    macro_f1,
    weighted_f1,
)

SHARED = Path(os.environ.get("GATES_SHARED", Path(__file__).parents[3].parent / "shared"))

MIDPOINTS = CutOffs(5.5, 9.5)  # of sizes in whole millimeters


@pytest.fixture
def facts():
    folder = SHARED / "data" / "endoscopy"
    if not (folder / "sun_objects.csv").is_file():
        pytest.skip(f"no tables of SUN and the official folds in {folder}; set GATES_SHARED")
    return folder


def test_the_cut_offs_belong_to_the_outer_classes():
    sizes = [0.5, 5, 5.0001, 9.9999, 10, 30]
    assert TRUTH.classes(sizes).tolist() == [0, 0, 1, 1, 2, 2]
    assert MIDPOINTS.classes([5, 5.5, 6, 9, 9.5, 10]).tolist() == [0, 0, 1, 1, 2, 2]
    assert CutOffs(5, 10).classes([[4], [20]]).tolist() == [[0], [2]]


def test_objects_on_the_cut_offs_are_counted():
    assert count_on_cut_offs([5, 5, 4.99, 10, 9.9, 3]) == {5: 2, 10: 1}


def test_a_lower_bound_tells_the_class_only_when_large():
    known = has_known_class([3, 3, 10, 15, 9.5], [False, True, True, True, False])
    assert known.tolist() == [True, False, True, True, True]


@pytest.mark.parametrize("bad", [(0, 10), (10, 5), (5, 5), (5, np.inf), (np.nan, 10)])
def test_bad_cut_offs(bad):
    with pytest.raises(ValueError, match="ascending"):
        CutOffs(*bad)


def test_a_size_that_is_no_number_is_not_large():
    with pytest.raises(GatesError, match="1 of 3 sizes are NaN"):
        TRUTH.classes([1, np.nan, 3])


@pytest.mark.parametrize(
    ("cut_offs", "expected"), [(CONTINUOUS, 0.879), (PUBLISHED, 0.827), (MIDPOINTS, 0.980)]
)
def test_an_unbiased_regressor_on_whole_millimeters(facts, cut_offs, expected):
    """Errors of 5 % throw exact 5 mm over the cut-off half of the time; midpoints do not."""
    gt = pd.read_csv(facts / "sun_objects.csv")["size_mm"].to_numpy()
    assert count_on_cut_offs(gt) == {5: 19, 10: 4}
    below, above = norm.cdf(np.log(cut_offs.small / gt) / 0.05), norm.sf(
        np.log(cut_offs.large / gt) / 0.05
    )  # fmt: skip
    chances = np.stack([below, 1 - below - above, above], 1)
    expected_matrix = np.eye(3)[TRUTH.classes(gt)].T @ chances
    assert macro_f1(expected_matrix) == pytest.approx(expected, abs=6e-4)
    draws = np.random.default_rng(0).normal(size=(400, len(gt)))
    simulated = [
        macro_f1(confusion_matrix(TRUTH.classes(gt), cut_offs.classes(gt * np.exp(0.05 * draw))))
        for draw in draws
    ]
    assert np.mean(simulated) == pytest.approx(expected, abs=0.01)


def test_a_constant_scores_high_on_the_official_folds(facts):
    frames = pd.read_csv(facts / "hag6_official_fold_counts.csv")
    counts = frames[["frames_D_approx", "frames_S_approx", "frames_L_approx"]].to_numpy()
    binary = np.stack([counts[:, :2].sum(1), counts[:, 2]], 1)
    for support, mean, pooled in ((binary, 0.864, 0.837), (counts, 0.742, 0.707)):
        all_first = np.zeros((len(support) + 1, support.shape[1], support.shape[1]))
        all_first[:, :, 0] = np.vstack([support, support.sum(0)])
        scores = weighted_f1(all_first)
        assert scores[:-1].mean() == pytest.approx(mean, abs=6e-4)
        assert scores[-1] == pytest.approx(pooled, abs=6e-4)
        assert macro_f1(all_first)[-1] < 0.5
