"""An evaluation without a run folder: tables of predictions in, figures out."""

import numpy as np
import pytest

from endoscopy.evaluation.baselines import REGRESSION
from endoscopy.evaluation.conformal import SplitConformal, coverage_interval, coverage_note
from endoscopy.evaluation.rendered_frames import predictions_of
from endoscopy.evaluation.size_evaluation import ACCURACY, CERTAINTY, HEADLINE, Bars, SizeEvaluation
from endoscopy.evaluation.size_scores import score_differences


def nearly_right(error, seed):
    draws = np.random.default_rng(seed)

    def predict(frames):
        return frames.gt * np.exp(error * draws.normal(size=len(frames)))

    return predict


@pytest.fixture(scope="module")
def evaluated(disks):
    train, test = disks(60), disks(80, seed=1)
    scores = SizeEvaluation("ours", resamples=200)
    residuals = tuple(np.linspace(-0.1, 0.1, 200))
    for seed in (0, 1):
        found = predictions_of(nearly_right(0.1, seed), test)
        reasons = np.where(found["distance_mm"] > 25, "too far", "")
        scores.add("test", "ours", seed, found.assign(reasons=reasons, sharpness=1.0))
        scores.intervals[seed] = SplitConformal(residuals)
    scores.add_baselines("test", train.table, found)
    scores.add_cues([train, disks(40, seed=2), test], found)
    scores.add("test", "other", 0, predictions_of(nearly_right(0.3, 7), test))
    scores.add("test", "other", 1, predictions_of(nearly_right(0.3, 8), test))
    wrong = predictions_of(lambda frames: 2 * frames.gt, test)
    for seed, start in ((0, 0), (0, 160), (1, 0), (1, 160)):  # of two folds
        part = wrong.iloc[start : start + 160].assign(reasons="", sharpness=1.0)
        scores.add("bright", "ours", seed, part)
    return scores


def figure(scores, method, metric, task="test", versus=""):
    key = (method, task, metric, versus)
    [row] = [r for r in scores.rows() if (*r[:3], r.versus) == key]
    return row


@pytest.mark.fault("endoscopy B6")
def test_the_regression_on_three_numbers_stands_in_the_first_line_and_table(evaluated):
    own = figure(evaluated, REGRESSION, "mape")
    assert 0 < own.value < figure(evaluated, "area", "mape").value
    line = evaluated.headline
    assert (
        f"area and brightness: macro F1 {figure(evaluated, REGRESSION, 'macro_f1').value:.3f}"
        in (line)
    )
    assert "and significantly better than the regression on area and brightness." in line or (
        "and NOT significantly better than the regression on area and brightness." in line
    )
    gap = figure(evaluated, REGRESSION, "mape", versus="ours")
    assert gap.value == pytest.approx(own.value - figure(evaluated, "ours", "mape").value)
    assert gap.low <= gap.value <= gap.high


@pytest.mark.fault("endoscopy B9")
def test_coverage_counts_the_draw_of_the_calibration_objects(noisy_objects):
    """The coverage of calibration sets of 200 varies by about two hundredths."""
    few, many = (
        SplitConformal(tuple(np.linspace(-0.2, 0.2, count).tolist())) for count in (200, 20_001)
    )
    objects = noisy_objects(3000, 0.1)
    narrow, wide = (coverage_interval([objects], [one], resamples=300) for one in (many, few))
    assert wide.value == pytest.approx(narrow.value, abs=0.01)
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)
    covered = [
        float((np.abs(draws) <= np.sort(np.abs(calibration))[180]).mean())
        for seed in range(300)
        for draws, calibration in [
            np.split(np.random.default_rng(seed).normal(size=20_200), [20_000])
        ]
    ]
    low, high = np.quantile(covered, [0.025, 0.975])
    down, up = few.calibration_spread()
    assert down == pytest.approx(np.mean(covered) - low, rel=0.15)
    assert up == pytest.approx(high - np.mean(covered), rel=0.15)


@pytest.mark.fault("endoscopy B9")
def test_coverage_that_excludes_the_nominal_one_is_said(evaluated):
    assert "bright: the 90% intervals cover 0.000" in evaluated.note
    assert "of the true sizes, fewer than they promise." in evaluated.note
    assert evaluated.note.startswith("classes of the truth at 5/10 mm")
    assert coverage_note("test", (0.88, 0.85, 0.91), 0.9) == ""
    assert "more than they promise" in coverage_note("test", (0.98, 0.95, 0.99), 0.9)
    assert coverage_note("test", (0.5, np.nan, np.nan), 0.9) == ""


@pytest.mark.fault("endoscopy B10")
def test_what_abstention_gains_stands_in_the_table(evaluated):
    for metric in ("coverage_accepted", "coverage_abstained", "mape_accepted", "mape_abstained"):
        row = figure(evaluated, "ours", metric)
        assert metric in HEADLINE
        assert 0 <= row.value <= 1
    rows = [figure(evaluated, "ours", f"coverage_{name}") for name in ("accepted", "abstained")]
    assert sum(row.n for row in rows) == 80
    assert 0 < sum(row.n * row.value for row in rows) / 80 < 1


def test_bars_are_judged_by_the_mean_over_seeds(evaluated):
    bars = evaluated.bars(Bars(macro_f1=0.5, mape=0.01, crop_macro_f1=0.7, coverage=(0.1, 1.0)))
    assert [bar.met for bar in bars] == [True, False, True, True]
    assert bars[1].value == figure(evaluated, "ours", "mape").value


def test_methods_are_compared_and_all_predictions_are_kept(evaluated):
    gaps = [row for row in evaluated.rows() if row.versus]
    assert {row.label for row in gaps} >= {"other − ours", f"{REGRESSION} − ours"}
    assert {row.task for row in gaps} == {"test"}
    alone = score_differences(
        evaluated.objects("test", "other"), evaluated.objects("test", "ours"), only=["mape"],
        resamples=evaluated.resamples,
    )  # fmt: skip
    p = figure(evaluated, "other", "mape", versus="ours").p
    assert alone["mape"].p <= p <= 1  # corrected for the number of methods
    assert len({row.method for row in gaps}) * alone["mape"].p >= p
    table = evaluated.table()
    assert set(table["variant"]) >= {"ours", "other", "constant", "area", REGRESSION}
    assert table[table["variant"] == "ours"].groupby("task").size().tolist() == [2 * 80 * 4] * 2
    assert evaluated.subgroups() is not None


@pytest.mark.fault("endoscopy C15")
def test_no_table_is_wider_than_a_page(evaluated):
    for metrics in (ACCURACY, CERTAINTY):
        assert len(metrics) <= 6
    assert {row.method for row in evaluated.rows() if row.metric in CERTAINTY} == {"ours"}
    first = list(dict.fromkeys(row.metric for row in evaluated.rows()))
    assert first[: len(ACCURACY)] == list(ACCURACY)  # the columns that fit are the main ones
