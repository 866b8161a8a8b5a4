import numpy as np
import pandas as pd
import pytest
import torch

from studies import (
    Budget,
    PlantedTask,
    generalization_study,
    generalization_table,
    planted_data,
    planted_features_headline,
    planted_features_study,
    planted_features_table,
)
from studies.generalization import digits

SMALL = PlantedTask(
    num_features=16,
    num_informative=4,
    num_train=200,
    steps=250,
    hidden_dim=24,
    gate_learning_rates=(2e-2,),
    penalties=(1.0,),
)


def test_only_the_planted_inputs_matter():
    data = planted_data(PlantedTask(num_train=8000, noise=0.0), seed=3)
    x, y = data.inputs["train"].double(), data.targets["train"].double()
    assert (data.informative.sum(), y.std().item()) == (8, pytest.approx(1, abs=0.05))
    moments = torch.cat([x.T @ y, ((x[:, :, None] * x[:, None]).reshape(8000, -1).T @ y)]) / 8000
    linear = moments[:64].abs().numpy()
    assert linear[data.informative].min() > 0.1
    assert linear[~data.informative].max() < 0.06
    products = moments[64:].view(64, 64).abs().numpy().max(0)
    assert products[data.informative].min() > 0.1
    assert products[~data.informative].max() < 0.1
    again = planted_data(PlantedTask(num_train=8000, noise=0.0), seed=3)
    assert torch.equal(again.inputs["test"], data.inputs["test"])


def test_the_study_tells_selection_from_its_absence():
    rows = planted_features_study(range(2), task=SMALL)
    assert len(rows) == 2 * 5
    mean = rows.groupby("method")[["ranking_auc", "open_rest", "r2"]].mean()
    assert mean.loc["L0 hard concrete", "ranking_auc"] > 0.8
    assert mean.loc["lasso", "ranking_auc"] > 0.9
    assert mean.loc["L0 hard concrete", "open_rest"] < 0.5
    assert mean.loc["sigmoid, dual", "open_rest"] > 0.9  # no sigmoid gate closes
    assert (rows["r2"] > 0).all()
    again = planted_features_study([1], task=SMALL, methods=["sigmoid, dual"])
    first = rows[(rows["seed"] == 1) & (rows["method"] == "sigmoid, dual")]
    assert again["ranking_auc"].iloc[0] == first["ranking_auc"].iloc[0]


def test_verdicts_on_selection():
    draws = np.random.default_rng(0)
    kinds = {"no gates": (0.7, np.nan), "selects": (0.95, 0.1), "ranks only": (0.95, 1.0),
             "chance": (0.5, 0.1)}  # fmt: skip
    rows = pd.DataFrame(
        {"method": name, "seed": seed, "ranking_auc": auc + 0.02 * draws.normal(),
         "product_auc": auc, "r2": 0.5, "open_informative": 1.0, "open_rest": open_rest}
        for name, (auc, open_rest) in kinds.items() for seed in range(10)
    )  # fmt: skip
    table = planted_features_table(rows).set_index("method")
    assert table["selection"].drop("no gates").tolist() == [
        "shown", "ranks only", "refuted",
    ]  # fmt: skip
    selects = table.loc["selects"]
    values = rows[rows["method"] == "selects"]["ranking_auc"]
    half = 2.262 * values.std() / 10**0.5  # Student's t with 9 degrees of freedom
    assert selects["ranking_auc_high"] - selects["ranking_auc"] == pytest.approx(half, rel=1e-3)
    assert selects["gain_low"] > 0.2
    line = planted_features_headline(table.reset_index())
    assert "selects shown (ranking AUC 0.9" in line
    assert "chance refuted" in line
    assert "against weights without gates, 100% of the other inputs open)" in line


def test_every_variant_learns_digits_with_one_budget():
    budget = Budget(epochs=4, batch=32, widths=(8, 8, 16), num_train=300)
    ticks = []
    predictions = generalization_study(
        digits(), seeds=range(2), budget=budget, tick=lambda: ticks.append(1)
    )
    assert len(ticks) == predictions.groupby(["variant", "seed"]).ngroups
    assert len(predictions) == 5 * 2 * 720
    table = generalization_table(predictions, resamples=200).set_index("variant")
    assert (next(iter(table.index)), len(table)) == ("plain", 5)
    assert (table["accuracy"] > 0.3).all()  # chance is 0.1
    assert (table["accuracy_low"] < table["accuracy"]).all()
    gaps = table["accuracy_difference"].drop("plain")
    expected = table["accuracy"].drop("plain") - table["accuracy"]["plain"]
    np.testing.assert_allclose(gaps, expected.loc[gaps.index], atol=1e-12)
    by = predictions.set_index(["variant", "seed"])["predicted"]
    assert (by["gates, dual", 0].to_numpy() != by["gates, off", 0].to_numpy()).any()
    assert (by["gates, dual", 0].to_numpy() != by["gates, joint", 0].to_numpy()).any()
