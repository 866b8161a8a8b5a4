import numpy as np
import pytest

from endoscopy.data.streams import box_masks
from endoscopy.evaluation.audits import (
    box_audit,
    fit_scale,
    mask_audit,
    oracle_scale_audit,
    oracle_scales,
    partition_audit,
    perturbed_boxes,
    shortcut_audit,
    size_proxy,
    table_rows,
)
from endoscopy.evaluation.baselines import fit_log_linear, fit_pinhole
from endoscopy.evaluation.rendered_frames import masked_median, predictions_of


@pytest.fixture(scope="module")
def pinhole(disks):
    def parts(frames):
        return np.sqrt(frames.masks.mean((1, 2))), masked_median(frames.depths, frames.masks)

    train = disks(150)
    fit = fit_pinhole(*parts(train), train.gt)
    return lambda frames: fit.predict(*parts(frames))


@pytest.fixture(scope="module")
def habit(disks):
    """Predicts the size from the distance alone, as it went together in training."""

    def distance(frames):
        return np.log(masked_median(frames.depths, frames.masks))[:, None]

    train = disks(200, rho=0.8)
    fit = fit_log_linear(distance(train), train.gt, train.objects)
    return lambda frames: fit.predict(distance(frames))


def test_a_shortcut_is_found(disks, habit, pinhole, refused):
    tests = {rho: disks(150, rho=rho, seed=3) for rho in (0.8, 0.0, -0.8)}
    leaning = shortcut_audit(habit, tests, resamples=300).set_index("condition")
    assert list(leaning.index) == ["rho 0.8", "rho 0", "rho -0.8"]
    assert leaning["paired"].all()
    assert np.isnan(leaning.loc["rho 0.8", "macro_f1_change"])
    assert (leaning["macro_f1_change_high"].dropna() < 0).all()
    assert leaning.loc["rho 0", "mape_change_low"] > 0
    assert leaning.loc["rho 0", "mape_change"] < leaning.loc["rho -0.8", "mape_change"]
    honest = shortcut_audit(pinhole, tests, resamples=300).set_index("condition")
    assert honest["macro_f1_change"].abs().max() < 0.06
    refused(r"expected the trained 0\.5", shortcut_audit, pinhole, tests, trained_rho=0.5)
    rows = table_rows("shortcut", leaning.reset_index(), task="audit: shortcut")
    gaps = {(row.method, row.metric): row for row in rows if row.versus}
    assert {row.versus for row in gaps.values()} == {"rho 0.8"}
    assert {method for method, _ in gaps} == {"rho 0", "rho -0.8"}
    gap = gaps["rho -0.8", "mape"]
    assert gap.value == leaning.loc["rho -0.8", "mape_change"]
    assert gap.significant
    assert 2 * leaning.loc["rho -0.8", "mape_p_value"] == pytest.approx(gap.p)  # Holm
    assert not any(row.metric.endswith("_change") for row in rows)


def test_objects_against_the_habit_are_set_apart(disks, habit, refused):
    predictions = predictions_of(habit, disks(300, rho=0.8, seed=5))
    rows = partition_audit(predictions, resamples=300).set_index("condition")
    assert rows["objects"].sum() == 300
    assert rows.loc["consistent", "objects"] > rows.loc["inconsistent", "objects"]
    assert rows["correlation"].iloc[0] > 0.4
    assert rows.loc["inconsistent", "mape_change_low"] > 0
    assert rows.loc["inconsistent", "macro_f1_change_high"] < 0
    changes = table_rows("partition", rows.reset_index(), task="audit: partition")
    assert not [row for row in changes if row.versus]  # other objects: the difference is not paired
    assert [row.method for row in changes if row.metric == "mape_change"] == ["inconsistent"]
    refused("lack the column brand", partition_audit, predictions, cue="brand")


def test_masks_of_disks(disks, pinhole):
    frames = disks(60, seed=6)
    poor = np.zeros_like(frames.masks)
    poor[:, :20, :20] = True
    poor[::4] = False
    rows = mask_audit(pinhole, frames, predicted={"segmenter": poor}, resamples=300)
    rows = rows.set_index("condition")
    assert rows.loc["true mask", "overlap"] == 1
    assert rows.loc["ellipse in the box", "overlap"] > 0.85  # the disk itself, up to pixels
    assert rows.loc["ellipse in the box", "mape_change"] == pytest.approx(0, abs=0.02)
    box = rows.loc["box"]
    assert box["overlap"] == pytest.approx(np.pi / 4, abs=0.05)
    # A box has 4/π of the area of its disk.
    assert box["mape"] == pytest.approx((4 / np.pi) ** 0.5 - 1, abs=0.03)
    assert rows.loc["segmenter", "mape_change_low"] > 0


def test_a_box_that_is_wrong_by_a_fifth(disks, pinhole):
    def by_mask(frames):
        true_depth = masked_median(original.depths, original.masks)
        return 1.26 * np.sqrt(frames.masks.mean((1, 2))) * true_depth

    original = disks(60, seed=7)
    rows = box_audit(by_mask, original, resamples=300).set_index("condition")
    assert rows.loc["right box", "log_change"] == 0
    assert rows.loc["box 80%", "log_change"] == pytest.approx(-np.log(0.8), abs=0.05)
    assert rows.loc["box 120%", "log_change"] == pytest.approx(np.log(1.2), abs=0.05)
    assert rows.loc["shift 20% down", "log_change"] < 0.06
    assert (
        rows.loc["box 120%", "bias_mm_change_low"] > 0 > rows.loc["box 80%", "bias_mm_change_high"]
    )
    boxes = np.array([[0, 2, 10, 8], [20, 28, 21, 30]])
    moved = perturbed_boxes(boxes, 30, 40, scale=0.5, shift=(-0.6, 1))
    np.testing.assert_allclose(moved, [[0, 9.5, 1.5, 12.5], [19.65, 29, 20.65, 30]])


def test_the_true_scale_is_worth_what_the_mask_lets_it(disks):
    frames = disks(120, seed=8)
    scale = np.exp(0.5 * np.random.default_rng(0).normal(size=len(frames)))
    unscaled = frames.depths / scale[:, None, None]
    train = disks(150)
    global_scale = fit_scale(size_proxy(train.masks, train.depths), train.gt)

    def predict(seen):  # metric depth makes the proxy the size
        return size_proxy(seen.masks, seen.depths)

    poor = box_masks(perturbed_boxes(frames.boxes, 48, 48, scale=0.5), 48, 48)
    rows = oracle_scale_audit(
        predict,
        frames,
        unscaled,
        global_scale=global_scale,
        masks={"half box": poor},
        resamples=300,
    ).set_index("condition")
    assert rows.loc["true scale of each frame", "mape"] == pytest.approx(0, abs=1e-6)
    assert 0 < rows.loc["true scale of each polyp", "mape"] < rows.loc["one scale", "mape"]
    assert rows.loc["true scale of each frame, half box", "mape"] > 0.3
    proxy, gt, objects = np.array([1.0, 3, 4]), np.array([2.0, 3, 2]), np.array([8, 8, 5])
    scales = [oracle_scales(proxy, gt, objects, per) for per in ("frame", "polyp", "all")]
    np.testing.assert_allclose(scales, [[2, 1, 0.5], [1.1, 1.1, 0.5], [19 / 26] * 3])


def test_frames_must_fit_together(disks, refused):
    frames = disks(3)
    for words, changes in (
        ("lengths", {"masks": frames.masks[1:]}),
        ("lacks gt", {"table": frames.table.drop(columns="gt")}),
    ):
        refused(words, frames.with_, **changes, error=ValueError)
    refused("returned", predictions_of, lambda f: np.ones(2), frames, error=ValueError)
    part = frames.take(frames.objects == "o1")
    assert part.objects.tolist() == ["o1"] * 4
    np.testing.assert_array_equal(part.masks, frames.masks[4:8])
