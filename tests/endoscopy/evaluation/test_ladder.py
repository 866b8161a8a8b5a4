import numpy as np
import pytest

from core_gates.errors import GatesError
from endoscopy.evaluation.baselines import (
    AREA,
    FRAME_AGC,
    LOCAL_AGC,
    LOCAL_FIXED,
    METRIC,
    cue_baselines,
    ladder,
    ladder_order,
    ladder_predictions,
)
from endoscopy.evaluation.rendered_frames import FrameStack, frame_features, masked_median


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


def test_cues_are_proportional_to_the_size(disks):
    frames = disks(60)
    table = frame_features(frames)
    distance = np.log(frames.table["distance_mm"].to_numpy())
    np.testing.assert_allclose(table["log_depth"], distance, atol=1e-5)
    extent = table["log_extent"] + distance - np.log(table["gt"])
    assert extent.std() < 0.12  # 48 pixels
    assert np.corrcoef(table["local_brightness"], distance)[0, 1] < -0.98


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


def test_the_order_is_judged_by_paired_differences(features):
    tables = ladder_predictions(features["train"], features["test"])
    claims = ladder_order(tables, resamples=300).set_index(["lower", "upper"])
    assert claims.loc[("constant", AREA), "holds"]
    assert claims.loc[(LOCAL_FIXED, METRIC), "holds"]
    swapped = tables | {METRIC: tables[LOCAL_FIXED], LOCAL_FIXED: tables["constant"]}
    broken = ladder_order(swapped, resamples=300)
    assert not broken["holds"].all()
    same = ladder_order(tables | {LOCAL_AGC: tables[AREA]}, resamples=300)
    assert same.set_index(["lower", "upper"]).loc[(AREA, LOCAL_AGC), "holds"]


def test_empty_masks_are_refused(disks):
    frames = disks(2)
    with pytest.raises(GatesError, match="8 of 8 masks are empty"):
        frame_features(frames.with_(masks=np.zeros_like(frames.masks)))
    without = frame_features(frames.with_(depths=None))
    assert without["log_depth"].isna().all()


def test_baselines_of_masks_and_depth(features):
    train, test = features["train"]["fixed"], features["test"]["fixed"]
    errors = {
        name: np.abs(np.log(sizes / test["gt"])).mean()
        for name, sizes in cue_baselines(train, test).items()
    }
    assert errors["mask area × depth"] < 0.1
    assert errors["mask area + photometry"] < 0.15
    assert 0.15 < errors["mask area"] < 0.6 * errors["constant"]
    without = cue_baselines(train, test.assign(log_depth=np.nan))
    assert "mask area × depth" not in without
