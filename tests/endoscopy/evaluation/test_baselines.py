import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core_gates.errors import GatesError
from endoscopy.evaluation.baselines import (
    baseline_predictions,
    box_features,
    constant_size,
    fit_log_linear,
    fit_pinhole,
)
from endoscopy.evaluation.size_evaluation import cut_off_note, headline, verdict
from endoscopy.metrics import CONTINUOUS, CutOffs, object_table


def test_power_laws_are_fitted_exactly():
    draws = np.random.default_rng(0)
    features = draws.normal(size=(80, 2))
    gt = np.exp(0.3 + features @ [1.0, -0.5])
    fit = fit_log_linear(features, gt, np.arange(80), ridge=0)
    np.testing.assert_allclose(fit.predict(features), gt)
    shrunk = fit_log_linear(features, gt, np.arange(80), ridge=10.0)
    assert (np.abs(shrunk.weights) < 0.2 * np.abs(fit.weights)).all()


def test_every_object_weighs_the_same():
    draws = np.random.default_rng(1)
    features, gt = draws.normal(size=(30, 1)), np.exp(draws.normal(size=30))
    counts = draws.integers(1, 9, 30)
    once = fit_log_linear(features, gt, np.arange(30))
    often = fit_log_linear(
        features.repeat(counts, 0), gt.repeat(counts), np.arange(30).repeat(counts)
    )
    np.testing.assert_allclose(once.predict(features), often.predict(features))


@given(st.floats(0.2, 5))
def test_predictions_follow_the_unit_of_length(factor):
    draws = np.random.default_rng(2)
    features, gt = draws.normal(size=(40, 3)), np.exp(draws.normal(size=40))
    fit = fit_log_linear(features, gt, np.arange(40))
    scaled = fit_log_linear(3 * features + 1, factor * gt, np.arange(40))
    np.testing.assert_allclose(scaled.predict(3 * features + 1), factor * fit.predict(features))


def test_without_features_the_fit_is_the_geometric_mean():
    fit = fit_log_linear(np.zeros((3, 0)), np.array([2.0, 2.0, 16.0]), np.array(["a", "a", "b"]))
    np.testing.assert_allclose(fit.predict(np.zeros((2, 0))), 32**0.5)


def test_the_pinhole_is_exact_for_a_pinhole():
    draws = np.random.default_rng(3)
    gt, distance = draws.uniform(2, 20, 50), draws.uniform(9, 30, 50)
    extent = 0.4 * gt / distance
    np.testing.assert_allclose(fit_pinhole(extent, distance, gt).predict(extent, distance), gt)


def test_the_constant_is_the_median_of_objects_not_of_frames():
    frames = pd.DataFrame({"unique_id": ["a"] * 9 + ["b", "c"], "gt": [20.0] * 9 + [3.0, 4.0]})
    assert constant_size(frames) == 4.0


def test_baselines_of_boxes(disks):
    train, test = disks(200).table, disks(100, seed=1).table
    predictions = baseline_predictions(train, test)
    assert predictions["constant"]["predicted_mm"].nunique() == 1
    scores = {}
    for name, table in predictions.items():
        objects = object_table(table)
        scores[name] = np.abs(np.log(objects["predicted_mm"] / objects["gt"])).mean()
    assert scores["area"] < 0.6 * scores["constant"]
    line = headline(*(object_table(p) for p in (test.assign(predicted_mm=test["gt"]),
                                                *predictions.values())), resamples=200)  # fmt: skip
    assert "\n" not in line
    assert line.startswith("constant: macro F1 ")
    assert "model: macro F1 1.000 [1.000, 1.000], MAPE 0.000" in line
    assert line.endswith(
        "model is significantly better than the constant and significantly better than the area."
    )


def test_a_model_that_is_a_constant_is_called_so(noisy_objects):
    objects = noisy_objects(100, 0.1)
    constant = objects.assign(predicted_mm=6.0)
    draws = np.random.default_rng(0)
    guess = objects.assign(predicted_mm=6 * np.exp(0.05 * draws.normal(size=100)))
    assert verdict(guess, constant, resamples=300) == "NOT significantly better"
    assert verdict(objects, constant, resamples=300) == "significantly better"
    assert verdict(constant, objects, resamples=300) == "significantly worse"
    assert "NOT significantly better than the constant" in headline(
        [guess, guess], constant, objects, resamples=300
    )


@pytest.mark.fault("faults 4")
def test_no_verdict_from_five_objects(noisy_objects):
    objects = noisy_objects(100, 0.02).nsmallest(5, "gt")
    larger = objects.assign(predicted_mm=4 * objects["predicted_mm"])
    assert verdict(objects, larger, resamples=300) == "NOT significantly better"
    assert verdict(larger, objects, resamples=300) == "NOT significantly better"


def test_objects_on_the_cut_offs_are_told():
    objects = pd.DataFrame({"gt": [5.0, 5.0, 10.0, 7.0]})
    assert cut_off_note(objects, CutOffs(5.5, 9.5)) == (
        "classes of the truth at 5/10 mm, of predictions at 5.5/9.5 mm; of 4 objects 2 on 5 mm,"
        " 1 on 10 mm exactly."
    )
    assert "5/10 mm, of predictions at 5/10 mm" in cut_off_note(objects, CONTINUOUS)


def test_faulty_features(disks):
    with pytest.raises(ValueError, match="1 rows have features that are not finite"):
        fit_log_linear(np.array([[1.0], [-np.inf]]), np.ones(2), np.arange(2))
    with pytest.raises(ValueError, match="one length"):
        fit_log_linear(np.ones((2, 1)), np.ones(3), np.arange(3))
    table = disks(3).table
    with pytest.raises(GatesError, match="lacks width"):
        box_features(table.drop(columns="width"))
    with pytest.raises(GatesError, match="12 of 12 boxes are empty"):
        box_features(table.assign(bbox_xmax=table["bbox_xmin"]))
