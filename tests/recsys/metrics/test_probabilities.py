"""Metrics of probabilities: AUC, log loss, calibration, gains."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss as of_scikit_learn
from sklearn.metrics import roc_auc_score

from core_gates.errors import GatesError
from recsys.metrics import (
    auc,
    expected_calibration_error,
    gains_over_single,
    gauc,
    log_loss,
    normalized_entropy,
    predicted_over_observed,
    reliability,
    user_auc,
)
from recsys.metrics.probabilities import entropy

SCORED = st.lists(
    st.tuples(st.integers(-3, 3), st.booleans(), st.floats(0.1, 5)), min_size=2, max_size=40
)


@given(SCORED)
def test_equals_scikit_learn_with_ties_and_weights(rows):
    scores, labels, weights = map(np.array, zip(*rows, strict=True))
    found = auc(scores, labels, weights)
    if labels.all() or not labels.any():
        assert math.isnan(found.value)
        assert found.reason == ("no negative row" if labels.all() else "no positive row")
    else:
        expected = roc_auc_score(labels, scores, sample_weight=weights)
        assert (found.value, found.reason) == (pytest.approx(expected, abs=1e-12), "")


def test_infinite_scores_are_ranks():
    assert auc([-np.inf, 0.0, 0.0, np.inf], [0, 1, 0, 1]).value == 0.875


def test_rows_without_weight_are_no_rows():
    assert (auc([1, 2], [0, 1], [1, 0]).reason, auc([], []).reason) == ("no positive row", "no row")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (([0.1, np.nan], [0, 1]), "1 of 2 scores are NaN; leave out rows without one"),
        (([0.1, 0.2], [0, 2]), "1 of 2 labels are neither 0 nor 1; mask rows without a label"),
        (([0.1, 0.2], [0, np.nan]), "1 of 2 labels are neither 0 nor 1"),
        (([0.1, 0.2], [0, 1], [1, -1]), "weights must be finite and not negative"),
        (([0.1, 0.2], [0, 1, 1]), "must have one length"),
        (([[0.1, 0.2]], [[0, 1]]), r"scores have shape \(1, 2\), expected one per row"),
    ],
)
def test_faults_of_scores(arguments, line):
    with pytest.raises(GatesError, match=line):
        auc(*arguments)


OF_USERS = st.lists(
    st.tuples(
        st.integers(-2, 2), st.booleans(), st.sampled_from("abcd"), st.sampled_from([0.5, 1, 3])
    ),
    min_size=1,
    max_size=40,
)


def by_loop(scores, labels, users, weights):
    """Both means by their definition, one user after the other."""
    areas, sizes, excluded = [], [], 0
    for user in sorted(set(users)):
        rows = users == user
        if len(set(labels[rows])) < 2:
            excluded += 1
            continue
        areas.append(roc_auc_score(labels[rows], scores[rows], sample_weight=weights[rows]))
        sizes.append(weights[rows].sum())
    return areas, sizes, excluded


@given(OF_USERS)
def test_equals_a_loop_over_users(rows):
    scores, labels, users, weights = map(np.array, zip(*rows, strict=True))
    areas, sizes, excluded = by_loop(scores, labels, users, weights)
    found = gauc(scores, labels, users, weights)
    assert (found.users, found.excluded) == (len(areas), excluded)
    if areas:
        assert found.weighted == pytest.approx(np.average(areas, weights=sizes), abs=1e-12)
        assert found.mean == pytest.approx(np.mean(areas), abs=1e-12)
    else:
        assert math.isnan(found.weighted)
        assert found.reason == "no user has both classes"


def test_the_conventions_differ():
    users = np.repeat([7, 3], [8, 2])
    labels = np.array([0, 0, 0, 0, 0, 0, 0, 1, 0, 1])
    scores = np.arange(10.0)
    scores[8:] = 1, 0
    found = gauc(scores, labels, users)
    assert (found.weighted, found.mean) == (0.8, 0.5)
    assert user_auc(scores, labels, users).users.tolist() == [3, 7]


def test_a_million_rows_are_no_loop_over_users(count_calls):
    rng = np.random.default_rng(3)
    scores, labels = rng.normal(size=10**6), rng.integers(0, 2, 10**6)
    users = rng.integers(0, 50_000, 10**6)
    found, calls = count_calls(lambda: gauc(scores, labels, users))
    assert calls < 1000
    assert found.weighted == pytest.approx(0.5, abs=0.01)


def test_faults_of_users():
    with pytest.raises(GatesError, match=r"users have shape \(3,\), expected one for each of 2"):
        gauc([0.1, 0.2], [0, 1], [1, 2, 3])
    assert gauc([], [], np.zeros(0, dtype=int)).reason == "no user has both classes"


PROBABLE = st.lists(
    st.tuples(st.floats(0.001, 0.999), st.booleans(), st.floats(0.1, 5)), min_size=1, max_size=30
)


@given(PROBABLE)
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
def test_the_order_of_rows_does_not_matter_to_calibration(order):
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


def test_mean_relative_gain_and_seesaw():
    single = {"a": 0.6, "b": 0.75, "c": 0.8}
    found = gains_over_single({"a": 0.65, "b": 0.7, "c": 0.8}, single)
    assert found == (pytest.approx((0.5 - 0.2 + 0) / 3), 1, 3, 0)
    assert gains_over_single(single, single) == (0, 0, 3, 0)


def test_a_margin_forgives_small_losses():
    assert gains_over_single({"a": 0.5995}, {"a": 0.6}).worse == 1
    assert gains_over_single({"a": 0.5995}, {"a": 0.6}, margin=0.001).worse == 0


def test_tasks_without_a_comparison_are_left_out():
    found = gains_over_single(
        {"a": math.nan, "b": 0.6, "c": 0.6, "d": 0.7}, {"a": 0.6, "b": 0.5, "c": math.nan, "d": 0.6}
    )
    assert found == (pytest.approx(1), 0, 1, 3)
    assert math.isnan(gains_over_single({}, {}).mean)
    with pytest.raises(GatesError, match="tasks differ: a and, alone, b; expected the same"):
        gains_over_single({"a": 0.6}, {"b": 0.6})
