import json

import numpy as np
import pandas as pd
import pytest

from core_gates.errors import GatesError
from endoscopy.evaluation.conformal import (
    SplitConformal,
    calibrate,
    calibrate_few_frames,
    coverage_table,
    draw_frames,
)
from endoscopy.metrics import TRUTH, expected_calibration_error, object_table


def test_the_quantile_counts_the_new_object(refused):
    conformal = SplitConformal(tuple(np.arange(1, 11) / 100), coverage=0.9)
    assert conformal.half_width == pytest.approx(0.10)  # the 10th of 10, not their 90 % quantile
    low, high = conformal.interval(np.array([10.0]))
    assert np.log(high / low) == pytest.approx(0.2)
    refused(
        "8 objects cannot give 90%",
        SplitConformal,
        tuple([0.1] * 8),
        coverage=0.9,
        error=ValueError,
    )
    for numbers in ((np.nan, 0.1, 0.2), (0.0, 0.1, 0.2)):
        refused("must be finite", SplitConformal, numbers, 0.5, ((1, np.inf),), error=ValueError)


def test_a_shift_breaks_coverage_and_shows(noisy_objects):
    conformal = calibrate(noisy_objects(300, 0.1), training_ids=[])
    mixed = noisy_objects(300, 0.1, seed=1).assign(brand="A")
    shifted = noisy_objects(300, 0.1, seed=2, shift=0.3).assign(brand="B")
    shifted["unique_id"] += "b"
    both = pd.concat([mixed, shifted], ignore_index=True)
    table = coverage_table(both, conformal, by="brand").set_index("group")
    assert table.loc["brand A", "low"] < 0.9 < table.loc["brand A", "high"] + 0.02
    assert table.loc["brand B", "high"] < 0.3
    assert table.loc["all", "objects"] == 600


def test_lower_bounds_and_abstention(noisy_objects):
    objects = noisy_objects(4, 0.0)
    objects["gt"], objects["predicted_mm"] = [3.0, 15.0, 15.0, 8.0], [3.0, 30.0, 10.0, 4.0]
    objects["censored"] = [False, True, True, False]
    objects["abstained"] = [False, False, False, True]
    conformal = SplitConformal(tuple(np.linspace(-0.1, 0.1, 200)))
    table = coverage_table(objects, conformal, resamples=50).set_index("group")
    assert table.loc["all", "coverage"] == 0.5
    assert table.loc["accepted", "coverage"] == pytest.approx(2 / 3)
    assert table.loc["abstained", "coverage"] == 0
    assert table.loc["all", "undecided"] == 0.25  # 10 mm crosses the cut-off


def test_too_few_or_seen_objects_are_refused_in_one_line(noisy_objects, refused, refuses):
    objects = noisy_objects(200, 0.1)
    refused(r"found 199 calibration objects .* at least 200", calibrate, objects.iloc[:199],
            training_ids=[])  # fmt: skip
    refuses(
        GatesError,
        (
            "found 150",
            lambda: calibrate(objects.assign(censored=np.arange(200) < 50), training_ids=[]),
        ),
        (
            "1 of 200 calibration objects were trained on, such as o7",
            lambda: calibrate(objects, training_ids={"o7", "x"}),
        ),
    )


def noisy_frames(noisy_objects, objects, count, seed):
    """Frames of objects; every frame has its own error besides that of its object."""
    rng = np.random.default_rng(seed)
    frames = noisy_objects(objects, 0.05, seed=seed).loc[lambda t: t.index.repeat(count)]
    error = np.exp(rng.normal(0, 0.3, len(frames)))
    return frames.assign(predicted_mm=frames["predicted_mm"] * error).reset_index(drop=True)


def test_few_frames_have_wider_intervals_that_cover(noisy_objects):
    shares = {k: [] for k in (1, 2, 3, 9)}
    for seed in range(5):
        frames = noisy_frames(noisy_objects, 250, 9, seed)
        conformal = calibrate_few_frames(calibrate(object_table(frames), training_ids=[]), frames)
        assert ([k for k, _ in conformal.few_frames], conformal.usual_frames) == ([1, 2, 4, 8], 9)
        test = noisy_frames(noisy_objects, 250, 9, 1000 + seed)
        for k, found in shares.items():
            drawn = object_table(draw_frames(test, k))
            assert (drawn["num_frames"] == k).all()
            found.append(coverage_table(drawn, conformal, resamples=2)["coverage"].iloc[0])
    assert [np.mean(shares[k]) for k in (1, 2, 9)] == pytest.approx([0.9] * 3, abs=0.02)
    assert np.mean(shares[3]) > 0.9  # three frames have the interval of two
    low, _ = conformal.interval(np.full(5, 10.0), np.array([1, 2, 3, 9, 300]))
    assert low[0] < 0.8 * low[3]
    assert low[1] == low[2] < low[3] == low[4] == conformal.interval(np.array([10.0]))[0]
    wide = calibrate_few_frames(SplitConformal((5.0,) * 200), frames)
    assert wide.few_frames == tuple((k, 5.0) for k in (1, 2, 4, 8))  # never narrower


def test_objects_without_a_known_size_or_an_opinion_calibrate_nothing(noisy_objects):
    objects = noisy_objects(300, 0.15)
    known = calibrate(objects.iloc[:200], training_ids=[])
    objects.loc[objects.index[200:], "predicted_mm"] *= 9
    for column in ("censored", "abstained"):
        flagged = objects.assign(**{column: np.arange(300) >= 200})
        assert calibrate(flagged, training_ids=[]) == known


def test_a_few_short_tracks_neither_fail_nor_set_what_is_usual(noisy_objects):
    frames = noisy_frames(noisy_objects, 200, 4, 0)
    place = frames.groupby("unique_id").cumcount()
    frames = frames[~frames["unique_id"].isin([f"o{i}" for i in range(15)]) | (place == 0)]
    conformal = calibrate_few_frames(calibrate(object_table(frames), training_ids=[]), frames)
    assert (conformal.usual_frames, [k for k, _ in conformal.few_frames]) == (4, [1, 2])
    assert len(draw_frames(frames, 2)) == 15 + 2 * 185


def test_probabilities_of_classes_are_calibrated(noisy_objects):
    conformal = calibrate(noisy_objects(1000, 0.25, seed=1), training_ids=[])
    objects = noisy_objects(6000, 0.25, seed=2)
    chances = conformal.probabilities(objects["predicted_mm"].to_numpy())
    assert chances.sum(1) == pytest.approx(np.ones(6000))
    assert chances.min() > 0
    truth = TRUTH.classes(objects["gt"])
    assert expected_calibration_error(chances, truth) < 0.04
    assert expected_calibration_error(np.eye(3)[chances.argmax(1)], truth) > 0.1


def test_state_survives_json():
    conformal = SplitConformal((-0.2, 0.0, 0.1), 0.6, ((1, 0.4), (2, 0.3)), usual_frames=4)
    assert SplitConformal.from_state(json.loads(json.dumps(conformal.state()))) == conformal
