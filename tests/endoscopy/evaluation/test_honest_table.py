import numpy as np
import pandas as pd
import pytest

from core_gates.errors import GatesError
from endoscopy.evaluation.baselines import REGRESSION
from endoscopy.evaluation.honest_table import HonestComparison, honest_headline, honest_table

COUNT = 150


def trainings(effects, *, sizes=(50, 150), seeds=range(3), frames=2):
    """Predictions whose errors share a part by object and by seed; effects scale the error."""
    draws = np.random.default_rng(0)
    gt = np.exp(draws.uniform(np.log(2), np.log(20), COUNT))
    hard = draws.normal(size=COUNT)
    tables = []
    for size in sizes:
        for seed in seeds:
            error = hard + 0.3 * np.random.default_rng((size, seed)).normal(size=COUNT)
            for variant, effect in effects.items():
                own = np.random.default_rng((size, seed, len(variant))).normal(size=COUNT)
                sizes_mm = gt * np.exp(0.2 * effect * (error + 0.3 * own))
                tables.append(pd.DataFrame({
                    "variant": variant, "train_objects": size, "seed": seed,
                    "unique_id": [f"o{i}" for i in range(COUNT) for _ in range(frames)],
                    "frame_id": list(range(frames)) * COUNT, "gt": gt.repeat(frames),
                    "predicted_mm": sizes_mm.repeat(frames)}))  # fmt: skip
    return pd.concat(tables, ignore_index=True)


@pytest.mark.fault("endoscopy B8")
def test_no_difference_is_said_to_be_none():
    table = honest_table(trainings({"plain": 1.0, "gates, dual": 1.0, "SE": 1.0}), resamples=400)
    assert len(table) == 2 * 3 * 2
    compared = table[table["variant"] != "plain"]
    assert (compared["verdict"].isin(["no difference", "better alone", "worse alone"])).all()
    assert (compared["p_holm"] >= compared["p_value"]).all()
    line = honest_headline(table)
    assert line.startswith("No variant differs significantly from the plain network in macro_f1")
    assert "4 comparisons, 3 seeds" in line
    bounds = compared.loc[compared["score"] == "macro_f1", ["difference_low", "difference_high"]]
    reach = bounds.abs().to_numpy().max()
    assert line.endswith(f"Differences beyond ±{reach:.3f} are outside all intervals.")


def test_a_real_gain_is_found_and_signed():
    table = honest_table(trainings({"plain": 1.0, "good": 0.4, "bad!": 2.0}), resamples=400)
    verdicts = table.set_index(["train_objects", "variant", "score"])["verdict"]
    for size in (50, 150):
        assert verdicts[size, "plain", "mape"] == ""
        assert verdicts[size, "good", "mape"] == verdicts[size, "good", "macro_f1"] == "better"
        assert verdicts[size, "bad!", "mape"] == verdicts[size, "bad!", "macro_f1"] == "worse"
    gain = table.set_index(["train_objects", "variant", "score"]).loc[(50, "good", "mape")]
    assert gain["difference"] < 0
    assert gain["difference_low"] < gain["difference"] < gain["difference_high"] < 0
    line = honest_headline(table)
    assert line.startswith("4 of 4 comparisons")
    assert "good better at 50 objects (+" in line


def test_the_order_of_rows_does_not_matter():
    predictions = trainings({"plain": 1.0, "other": 0.9}, sizes=(50,))
    shuffled = predictions.sample(frac=1, random_state=0)
    table = honest_table(predictions, resamples=200)
    again = honest_table(shuffled, resamples=200).set_index(["variant", "score"])
    again = again.loc[table.set_index(["variant", "score"]).index].reset_index()
    for column in ("value", "low", "difference", "difference_high"):
        np.testing.assert_allclose(table[column], again[column], atol=1e-9)


def test_unequal_designs_are_refused(refuses, refused):
    predictions = trainings({"plain": 1.0, "other": 1.0}, sizes=(50,))
    refuses(
        GatesError,
        ("lack seed", lambda: honest_table(predictions.drop(columns="seed"))),
        ("no 'LayerScale'", lambda: honest_table(predictions, reference="LayerScale")),
    )
    short = predictions[(predictions["variant"] == "plain") | (predictions["seed"] < 2)]
    refused(r"other has seeds \[0, 1\] and plain \[0, 1, 2\]", honest_table, short)


@pytest.mark.fault("endoscopy B6")
def test_the_regression_stands_among_the_baselines_of_the_honest_table():
    predictions = trainings({"plain": 1.0, "SE": 1.0})
    baselines = trainings({"constant": 6.0, "area": 3.0, REGRESSION: 1.2})
    scores = HonestComparison(predictions, baselines, resamples=200)
    rows = {row[:3]: row.value for row in scores.rows() if not row.versus}
    assert 0 < rows[REGRESSION, "150 objects", "mape"] < rows["area", "150 objects", "mape"]
    assert "area and brightness: macro F1" in scores.headline
    assert scores.headline.startswith("With 150 training objects, constant: macro F1")
    differences = [row for row in scores.rows() if row.versus]
    assert {row.versus for row in differences} == {"plain"}
    (rival,) = [r for r in differences if r[:3] == (REGRESSION, "150 objects", "mape")]
    plain = rows["plain", "150 objects", "mape"]
    assert rival.value == pytest.approx(rows[REGRESSION, "150 objects", "mape"] - plain)
    assert rival.low < rival.value < rival.high
    assert ("SE", "50 objects", "mape") in {row[:3] for row in differences}
    assert all(0 < row.p <= 1 for row in differences)
    without = baselines[baselines["variant"] != REGRESSION]
    assert "brightness" not in HonestComparison(predictions, without, resamples=200).headline
