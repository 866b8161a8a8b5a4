import numpy as np
import pandas as pd
import pytest

from endoscopy.evaluation.conformal import abstention_table
from endoscopy.evaluation.size_scores import (
    score_differences,
    size_scores,
    subgroup_table,
)
from endoscopy.metrics import CutOffs


def plain(table, **options):
    return {
        k: float(v[0]) for k, v in size_scores(table, **options)(np.ones((1, len(table)))).items()
    }


def test_a_perfect_model(noisy_objects):
    scores = plain(noisy_objects(50, 0.0))
    ones = [k for k in scores if "mm" not in k and k != "mape"]
    assert [scores[k] for k in ones] == pytest.approx([1] * len(ones))
    assert scores["f1_5mm"] == scores["auroc_10mm"] == 1
    assert scores["mape"] == scores["rmse_mm"] == pytest.approx(0, abs=1e-12)


def test_lower_bounds_count_in_classes_alone():
    table = pd.DataFrame(
        {
            "unique_id": list("abcd"),
            "gt": [4.0, 8.0, 15.0, 7.0],
            "predicted_mm": [4.4, 8.0, 30.0, 20.0],
            "censored": [False, False, True, True],
        }
    )
    scores = plain(table)
    assert scores["mae_mm"] == pytest.approx(0.2)  # of the exact sizes
    assert scores["macro_f1"] == 1  # "7 mm or more" has no class
    assert scores["sensitivity_large"] == 1
    assert plain(table.assign(censored=False))["macro_f1"] < 1
    assert plain(table, cut_offs=CutOffs(4.2, 9.5))["macro_f1"] < 1  # of the predictions alone


def test_calibration_error_needs_probabilities(noisy_objects):
    table = noisy_objects(30, 0.1)
    assert "ece" not in plain(table)
    sure = table.assign(p_diminutive=1.0, p_small=0.0, p_large=0.0)
    assert plain(sure)["ece"] == pytest.approx((table["gt"] > 5).mean())


def test_classes_of_the_most_probable_instead_of_the_size(noisy_objects):
    table = noisy_objects(60, 2.0)
    right = np.eye(3)[(table["gt"] > 5).astype(int) + (table["gt"] >= 10)] * 0.6 + 0.4 / 3
    table[["p_diminutive", "p_small", "p_large"]] = right
    scores = plain(table)
    assert scores["macro_f1_probability"] == scores["weighted_f1_probability"] == 1
    assert scores["macro_f1"] < 0.7
    assert set(plain(table, only=("mape", "auroc_5mm"))) == {"mape", "auroc_5mm"}


def test_differences_ignore_the_order_of_rows(noisy_objects):
    good, bad = noisy_objects(150, 0.05), noisy_objects(150, 0.05).copy()
    bad["predicted_mm"] *= 1.2
    gap = score_differences(good, bad.sample(frac=1, random_state=0), resamples=300)
    assert gap["bias_mm"].high < 0
    assert gap["mape"].significant
    assert gap == score_differences(good, bad, resamples=300)
    cuts = CutOffs(3, 8)
    apart = plain(good, cut_offs=cuts)["macro_f1"] - plain(bad, cut_offs=cuts)["macro_f1"]
    assert score_differences(good, bad, cuts)["macro_f1"].value == pytest.approx(apart)


@pytest.mark.fault("faults 4")
@pytest.mark.parametrize("units", [1, 2, 5, 6])
def test_few_patients_show_nothing(noisy_objects, units):
    table = noisy_objects(60, 0.05).assign(patient=np.arange(60) % units)
    gap = score_differences(table, table.assign(predicted_mm=2 * table["predicted_mm"]))["mape"]
    assert gap.units == units
    assert gap.p >= 2.0 ** (1 - units)
    assert gap.significant == (units == 6)


def test_models_are_compared_on_the_same_objects(noisy_objects, refused):
    table = noisy_objects(20, 0.1)
    for words, other in (
        ("19 and 20 rows hold different unique", table.iloc[1:]),
        ("different true sizes", table.assign(gt=table["gt"] + 1)),
        ("repeat", pd.concat([table, table.iloc[:1]])),
    ):
        refused(words, score_differences, table, other)


def test_a_weak_subgroup_shows(noisy_objects, refused):
    good = noisy_objects(90, 0.05).assign(shape="sessile", distance_mm=np.linspace(9, 20, 90))
    weak = noisy_objects(60, 0.5, seed=1).assign(shape="flat", distance_mm=np.linspace(20, 30, 60))
    rare = noisy_objects(5, 0.1, seed=2).assign(shape="Ip", distance_mm=np.nan)
    objects = pd.concat([good, weak, rare], ignore_index=True)
    objects["unique_id"] = [f"o{i}" for i in range(155)]
    table = subgroup_table(objects, resamples=300)
    assert table["column"].unique().tolist() == ["all", "shape", "distance_mm"]
    by = table.set_index(["column", "group"])
    assert by.loc[("shape", "flat"), "mape_low"] > by.loc[("shape", "sessile"), "mape_high"]
    assert by.loc[("shape", "Ip"), "objects"] == 5
    assert np.isnan(by.loc[("shape", "Ip"), "mape"])
    distances = by.loc["distance_mm"]
    assert distances["objects"].tolist() == [50, 50, 50, 5]
    assert next(iter(distances.index)).startswith("≤")
    assert distances["mape"].iloc[0] < 0.1 < distances["mape"].iloc[2]
    assert by.loc[("all", "all"), "objects"] == 155
    refused("none of the columns brand", subgroup_table, objects, by=["brand"])


def test_abstention_by_reason(noisy_objects):
    frames = noisy_objects(40, 0.05)
    frames = frames.loc[frames.index.repeat(2)].reset_index(drop=True)
    frames["reasons"] = ""
    frames.loc[:19, "reasons"] = "blurred"  # both frames of 10 objects
    frames.loc[0, "reasons"] = "blurred; too near"
    frames.loc[20, "reasons"] = "too near"  # one frame of another
    frames.loc[:19, "predicted_mm"] *= 2
    table = abstention_table(frames).set_index("reason")
    assert list(table.index) == ["any", "blurred", "too near", "accepted"]
    assert table["frames"].tolist() == [21, 20, 2, 59]
    assert (table["objects"].tolist(), table.loc["any", "frame_rate"]) == ([10, 10, 1, 30], 21 / 80)
    assert table.loc["accepted", "object_rate"] == 0.75
    assert table.loc["accepted", "mape"] < 0.1 < table.loc["any", "mape"]
    assert abstention_table(frames.assign(reasons=""))["objects"].tolist() == [0, 40]
