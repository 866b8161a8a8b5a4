import numpy as np
import pytest

from endoscopy.metrics import expected_calibration_error, reliability


def sample(size, sharpen=1.0, seed=0):
    draws = np.random.default_rng(seed)
    chances = draws.dirichlet([1, 1, 1], size)
    truth = (draws.random(size)[:, None] > chances.cumsum(1)).sum(1)
    shown = chances**sharpen
    return shown / shown.sum(1, keepdims=True), truth


def test_true_probabilities_are_calibrated():
    probabilities, truth = sample(40_000)
    assert expected_calibration_error(probabilities, truth) < 0.01
    table = reliability(probabilities, truth)
    assert table["count"].sum() == 40_000
    assert (table["accuracy"] - table["confidence"]).abs().max() < 0.03


def test_overconfidence_shows():
    probabilities, truth = sample(40_000, sharpen=3)
    table = reliability(probabilities, truth)
    assert (table["confidence"] > table["accuracy"])[table["low"] > 0.5].all()
    assert expected_calibration_error(probabilities, truth) > 0.1


def test_closed_form():
    probabilities = np.array([[0.8, 0.2, 0.0]] * 10 + [[0.0, 0.4, 0.6]] * 10)
    truth = np.array([0] * 8 + [1] * 2 + [2] * 10)
    assert expected_calibration_error(probabilities, truth) == pytest.approx(0.5 * 0.4)
    only_first = np.repeat([1.0, 0.0], 10)
    weighted = expected_calibration_error(probabilities, truth, weights=only_first)
    assert weighted == pytest.approx(0)


def test_rows_must_be_distributions():
    with pytest.raises(ValueError, match="sum to one"):
        reliability(np.full((3, 3), 0.5), np.zeros(3))
