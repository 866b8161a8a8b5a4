import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.evidence import moments, root, root_ratio

SQUARES = np.random.default_rng(0).gamma(2.0, size=(12, 2))
WEIGHTS = np.random.default_rng(1).integers(0, 4, size=(5, 12)).astype(float)


def test_scores_of_repeated_samples():
    """An integer weight counts a sample that many times."""
    scores = moments(SQUARES, root_ratio, name="ratio")(WEIGHTS)
    for row, weights in enumerate(WEIGHTS.astype(int)):
        means = SQUARES.repeat(weights, axis=0).mean(0)
        assert scores["ratio"][row] == pytest.approx((means[0] / means[1]) ** 0.5)
    rmse = moments(SQUARES[:, 1], root)(WEIGHTS)["value"]
    single = moments(SQUARES[:, 1])(WEIGHTS)["value"]
    np.testing.assert_allclose(rmse, single**0.5)
    np.testing.assert_allclose(rmse, moments(SQUARES[:, 1:], root)(WEIGHTS)["value"])


@given(st.floats(0.1, 100))
def test_only_the_ratios_of_weights_count(factor):
    score = moments(SQUARES, root_ratio)
    np.testing.assert_allclose(score(factor * WEIGHTS)["value"], score(WEIGHTS)["value"])


@pytest.mark.parametrize("values", [[True, False, True], torch.tensor([1.0, 0, 1]).double()])
def test_values_of_other_types(values):
    assert moments(values, name="accuracy")(np.ones((1, 3)))["accuracy"] == [pytest.approx(2 / 3)]


def test_a_missing_value_is_not_left_out():
    assert np.isnan(moments([1.0, np.nan])(np.ones((1, 2)))["value"]).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: moments(np.zeros((3, 2))), r"\(N, M\) with a transform, found \(3, 2\)"),
        (lambda: moments([]), r"found \(0,\)"),
        (lambda: moments(np.zeros((3, 2, 2)), root), r"found \(3, 2, 2\)"),
        (lambda: moments(np.ones((3, 2)), np.sqrt)(np.ones((4, 3))), r"\(4, 2\) has shape \(4, 2"),
    ],
)
def test_bad_arguments(refuses, call, message):
    refuses(ValueError, (message, lambda: call()))
