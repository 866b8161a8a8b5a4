import numpy as np
import pandas as pd
import pytest

from core_gates.errors import GatesError
from endoscopy.evaluation.baselines import (
    AREA,
    FRAME_AGC,
    LOCAL_AGC,
    LOCAL_FIXED,
    METRIC,
    PHOTOMETRY,
    baseline_predictions,
    box_features,
    constant_size,
    cue_baselines,
    fit_log_linear,
    fit_photometry,
    fit_pinhole,
    ladder,
    ladder_order,
    ladder_predictions,
)
from endoscopy.evaluation.rendered_frames import FrameStack, frame_features, masked_median
from endoscopy.evaluation.size_evaluation import cut_off_note, headline, verdict
from endoscopy.metrics import CONTINUOUS, TRUTH, CutOffs, object_table


def test_power_laws_are_fitted_exactly():
    features = np.random.default_rng(0).normal(size=(80, 2))
    gt = np.exp(0.3 + features @ [1.0, -0.5])
    fit = fit_log_linear(features, gt, np.arange(80), ridge=0)
    np.testing.assert_allclose(fit.predict(features), gt)
    shrunk = fit_log_linear(features, gt, np.arange(80), ridge=10.0)
    assert (np.abs(shrunk.weights) < 0.2 * np.abs(fit.weights)).all()


@pytest.mark.fault("47 regression")
def test_the_regression_on_three_numbers_takes_the_degree_that_validation_objects_favor():
    draws = np.random.default_rng(3)

    def frames(count, cubic):
        cues = draws.normal(size=(count, 3))
        gt = np.exp(2 + cues @ [0.6, -0.4, 0.1] + cubic * cues[:, 0] * cues[:, 1] ** 2)
        gt *= np.exp(0.05 * draws.normal(size=count))
        table = pd.DataFrame(cues, columns=list(PHOTOMETRY))
        return table.assign(gt=gt, unique_id=np.arange(count))

    linear, cubic = (fit_photometry(frames(60, c), frames(60, c)) for c in (0.0, 0.2))
    assert (linear.degree, cubic.degree) == (1, 3)
    test = frames(60, 0.2)
    errors = np.log(cubic.predict(test[list(PHOTOMETRY)].to_numpy()) / test["gt"])
    assert np.abs(errors).mean() < 0.07


def test_every_object_weighs_the_same():
    draws = np.random.default_rng(1)
    features, gt = draws.normal(size=(30, 1)), np.exp(draws.normal(size=30))
    counts = draws.integers(1, 9, 30)
    once = fit_log_linear(features, gt, np.arange(30))
    often = fit_log_linear(
        features.repeat(counts, 0), gt.repeat(counts), np.arange(30).repeat(counts)
    )
    np.testing.assert_allclose(once.predict(features), often.predict(features))


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
    classed = objects.assign(predicted_mm=np.choose(TRUTH.classes(objects["gt"]), [1.0, 7, 40]))
    rough = noisy_objects(100, 0.3)  # worse classes, better millimeters
    assert verdict(classed, rough, resamples=300) == "NOT significantly better"
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


def unmasked(disks):
    return disks(2).with_(masks=np.zeros_like(disks(2).masks))


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (
            lambda _: fit_log_linear(np.array([[1.0], [-np.inf]]), np.ones(2), np.arange(2)),
            "1 rows have features that are not finite",
        ),
        (lambda _: fit_log_linear(np.ones((2, 1)), np.ones(3), np.arange(3)), "one length"),
        (lambda disks: box_features(disks(3).table.drop(columns="width")), "lacks width"),
        (
            lambda disks: box_features(disks(3).table.assign(bbox_xmax=0.0)),
            "12 of 12 boxes are empty",
        ),
        (lambda disks: frame_features(unmasked(disks)), "8 of 8 masks are empty"),
    ],
)
def test_faulty_features(disks, refused, words):
    with pytest.raises((GatesError, ValueError), match=words):
        refused(disks)


def radiance(images):
    """Undo the tone curve of the disks."""
    shown = (images[..., 0] / 255.0) ** 1.4
    return 0.35 * shown / (1.15 - shown)


def with_agc(frames, target=0.22):
    light = radiance(frames.images)
    light = light * (target / light.mean((1, 2), keepdims=True))
    shown = (1.15 * light / (0.35 + light)).clip(0, 1) ** (1 / 1.4)
    images = np.repeat((255 * shown).round().astype(np.uint8)[..., None], 3, -1)
    return FrameStack(images, frames.masks, frames.boxes, frames.table, frames.depths)


@pytest.fixture(scope="module")
def features(disks):
    parts = {}
    for name, count, seed in (("train", 150, 0), ("test", 300, 1)):
        frames = disks(count, seed=seed)
        parts[name] = {"fixed": frame_features(frames), "agc": frame_features(with_agc(frames))}
    return parts


def test_unknown_depth_does_not_count():
    depths, masks = np.zeros((2, 4, 4)), np.ones((2, 4, 4), dtype=bool)
    depths[0, 0] = 3.0
    median = masked_median(depths, masks)
    assert median[0] == 3
    assert np.isnan(median[1])


def test_each_rung_leads_as_far_as_physics_lets_it(features):
    table = ladder(features["train"], features["test"], resamples=300).set_index("features")
    mape = table["mape"]
    assert mape["constant"] == pytest.approx(0.64, abs=0.12)  # ∫ of log-uniform sizes
    assert mape[METRIC] < 0.08
    assert mape[LOCAL_FIXED] < 0.13  # one light, one albedo
    assert 3 * mape[METRIC] < mape[AREA] < 0.6 * mape["constant"]
    assert mape[LOCAL_AGC] > 1.5 * mape[LOCAL_FIXED]
    assert (table["mape_low"] < mape).all()
    assert (mape < table["mape_high"]).all()
    assert table["exposure"][FRAME_AGC] == "agc"
    train, test = features["train"]["fixed"], features["test"]["fixed"]
    assert (train["log_extent"] + train["log_depth"] - np.log(train["gt"])).std() < 0.12
    assert np.corrcoef(train["local_brightness"], train["log_depth"])[0, 1] < -0.98
    errors = {
        name: np.abs(np.log(sizes / test["gt"])).mean()
        for name, sizes in cue_baselines(train, train, test).items()
    }
    assert errors["mask area × depth"] < 0.1
    assert errors["mask area + photometry"] < 0.15
    assert 0.15 < errors["mask area"] < 0.6 * errors["constant"]
    assert "mask area × depth" not in cue_baselines(train, train, test.assign(log_depth=np.nan))


def test_the_order_is_judged_by_paired_differences(features):
    tables = ladder_predictions(features["train"], features["test"])
    claims = ladder_order(tables, resamples=300).set_index(["lower", "upper"])
    assert claims.loc[("constant", AREA), "holds"]
    assert claims.loc[(LOCAL_FIXED, METRIC), "holds"]
    swapped = tables | {METRIC: tables[LOCAL_FIXED], LOCAL_FIXED: tables["constant"]}
    assert not ladder_order(swapped, resamples=300)["holds"].all()
    same = ladder_order(tables | {LOCAL_AGC: tables[AREA]}, resamples=300)
    assert same.set_index(["lower", "upper"]).loc[(AREA, LOCAL_AGC), "holds"]
