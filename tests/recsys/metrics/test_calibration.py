import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.metrics import expected_calibration_error, predicted_over_observed, reliability


def test_bins_hold_equal_mass():
    rng = np.random.default_rng(0)
    probs, labels = rng.random(2000) ** 4, rng.integers(0, 2, 2000)
    found = reliability(probs, labels)
    assert found.counts.tolist() == [100] * 20
    order = np.argsort(probs).reshape(20, 100)
    np.testing.assert_allclose(found.predicted, probs[order].mean(1))
    np.testing.assert_allclose(found.observed, labels[order].mean(1))
    gaps = np.abs(probs[order].mean(1) - labels[order].mean(1))
    assert expected_calibration_error(probs, labels).value == pytest.approx(gaps.mean())


def test_a_weight_of_two_is_two_rows():
    rng = np.random.default_rng(1)
    probs, labels = rng.random(60).round(2), rng.integers(0, 2, 60)
    weights = rng.integers(0, 3, 60)
    twice = np.repeat(probs, weights), np.repeat(labels, weights)
    for found, expected in zip(
        reliability(probs, labels, weights, bins=7), reliability(*twice, bins=7), strict=True
    ):
        np.testing.assert_allclose(found, expected)
    assert predicted_over_observed(probs, labels, weights).value == pytest.approx(
        predicted_over_observed(*twice).value
    )


@given(st.permutations(range(20)))
def test_the_order_of_rows_does_not_matter(order):
    rng = np.random.default_rng(2)
    probs, labels, order = rng.integers(0, 5, 20) / 5, rng.integers(0, 2, 20), np.array(order)
    found = expected_calibration_error(probs[order], labels[order], bins=4)
    assert found.value == pytest.approx(expected_calibration_error(probs, labels, bins=4).value)


def test_calibrated_predictions_have_a_small_error_and_scaled_ones_their_ratio():
    rng = np.random.default_rng(3)
    probs = rng.random(50_000) * 0.4
    labels = rng.random(50_000) < probs
    assert expected_calibration_error(probs, labels).value < 0.01
    assert predicted_over_observed(probs, labels).value == pytest.approx(1, abs=0.03)
    assert predicted_over_observed(2 * probs, labels).value == pytest.approx(2, abs=0.06)
    assert expected_calibration_error(2 * probs, labels).value == pytest.approx(0.2, abs=0.01)


def test_what_is_missing_is_named():
    assert predicted_over_observed([0.2], [0]).reason == "no positive row"
    assert expected_calibration_error([], []).reason == "no row"
    assert len(reliability([], []).counts) == 0
    with pytest.raises(ValueError, match="bins must be at least 1"):
        reliability([0.1], [1], bins=0)
