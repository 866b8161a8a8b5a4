"""Runs and trials of the honest table are used only for the settings they were made with."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from apps.endoscopy.runs import run_settings, write_run

from apps.endoscopy.honest import BASELINES, HonestTable
from apps.endoscopy.training import Sizers
from core_gates.errors import GatesError
from endoscopy.data.datamodule import PolypSizingDataModule
from endoscopy.models import tiny_resnet
from endoscopy.renderer.config import RendererConfig
from endoscopy.renderer.dataset import render_dataset
from endoscopy.training.module import SizingModule
from harness.runs.folder import RunFolder

RATES = [{"learning_rate": 1e-3}, {"learning_rate": 2e-3}]
TRIALS = {"plain": RATES, "dual": RATES}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    root = tmp_path_factory.mktemp("rendered") / "set"
    list(render_dataset(root, RendererConfig(side=32, frames=2), 24))
    return root


@pytest.fixture
def make(rendered, tmp_path):
    """``make(steps, trials)``: the honest table of two variants, two sizes and two seeds."""

    def build(steps=3, trials=TRIALS, overwrite=False, **data):
        torch.manual_seed(0)
        widths = {"widths": [4, 4, 8], "depths": [1, 1]}
        module = SizingModule(tiny_resnet(("rgb_mask",), trunk_options=widths))
        counts = {"train_objects": 8, "validation_objects": 2, "test_objects": 12}
        options = {"synthetic": str(rendered), "streams": ["rgb_mask"], "size": 32} | counts
        frames = PolypSizingDataModule(**options | {"split": "counts"} | data)
        folder = RunFolder("endoscopy", "run", tmp_path / "runs", overwrite=overwrite)
        sizers = Sizers(folder, "here", module, frames, 2)
        return HonestTable(sizers, ("plain", "dual"), (4, 6), (0, 1), steps, trials, 4)

    return build


def finish(table):
    """Leave what a run leaves, without a training: trials, runs and baselines."""
    for number, (variant, k) in enumerate(table.tuning.waiting()):
        table.tuning.keep_trial(variant, k, 1 / (1 + number))
    table.tuning.keep()
    data = table.sizers.datamodule
    data.load()
    rows = data.load().frames.iloc[data.rows("test")].drop_duplicates("unique_id")
    for one in table.trainings():
        draws = np.random.default_rng((one.seed, len(one.variant)))
        found = rows[["unique_id", "patient", "gt"]].reset_index(drop=True)
        found["predicted_mm"] = found["gt"] * np.exp(0.1 * draws.normal(size=len(found)))
        write_run(table.folder / f"{one.name}.parquet", found, table.settings(one))
    for one in table.baselines():
        table.keep_baselines(one)
    return table


def test_what_is_finished_is_found(make):
    finish(make())
    table = make()
    assert table.missing() == []
    assert table.tuning.chosen() == {"plain": RATES[1], "dual": RATES[1]}
    path = table.path(table.trainings()[0])
    assert run_settings(path)["trainer.max_steps"] == 3
    assert run_settings(path)["model.learning_rate"] == 2e-3
    trial = json.loads((table.sizers.run_folder.path / "trials/plain-0.json").read_text())
    assert trial["settings"]["model.learning_rate"] == 1e-3
    assert len(trial["fingerprint"]) == 16


OTHER = {
    "more steps": ({"steps": 100}, "trainer.max_steps 3, now 100"),
    "another trial": ({"trials": {n: [{"learning_rate": 9e-3}] for n in TRIALS}}, "trials"),
    "another split": ({"split_seed": 5}, "data.split_seed 1, now 5"),
}


@pytest.mark.parametrize("case", OTHER)
def test_results_of_other_settings_are_refused_or_replaced(make, case):
    change, told = OTHER[case]
    finish(make())
    with pytest.raises(GatesError, match="was trained with other settings") as refusal:
        make(**change).missing()
    assert told in str(refusal.value)
    table = make(**change, overwrite=True)
    assert {one.variant for one in table.missing()} >= {"plain", "dual"}
    assert len(table.tuning.waiting()) > 0
    assert finish(table).missing() == []


def test_other_rates_than_the_chosen_ones_are_refused(make):
    table = finish(make())
    for number in range(2):
        table.tuning.keep_trial("plain", number, 0.1 + number)  # now the first one is best
    table.tuning.path.unlink()
    with pytest.raises(GatesError, match=r"model.learning_rate 0.002, now 0.001"):
        make().missing()


def test_a_run_that_does_not_tell_its_settings_is_refused(make):
    table = finish(make())
    path = table.path(table.trainings()[0])
    pd.read_parquet(path).to_parquet(path)
    with pytest.raises(GatesError, match="its settings are not known"):
        make().missing()


def test_results_of_the_package_need_no_data_and_only_count_if_they_fit(
    make, monkeypatch, tmp_path
):
    done = finish(make())
    shipped = tmp_path / "shipped"
    done.folder.rename(shipped)
    done.tuning.path.rename(shipped / "settings.json")
    for path in (done.sizers.run_folder.path / "trials").iterdir():
        path.unlink()
    monkeypatch.setattr(Sizers, "shipped", shipped)
    table = make(synthetic=str(tmp_path / "not rendered"))
    assert table.missing() == []
    assert len(table.rows()) > 0
    assert table.headline.startswith("With 6 training objects, constant: macro F1")
    other = make(steps=100)
    assert len(other.missing()) == 8  # baselines do not depend on steps
    assert "trainer.max_steps 3, now 100" in other.reason(other.missing())


def test_baselines_stand_at_every_size(make):
    table = finish(make())
    rows = {(row.method, row.task, row.metric): row.value for row in table.rows()}
    area = [rows["area", f"{size} objects", "mape"] for size in (4, 6)]
    assert area[0] != area[1]
    assert rows["constant", "4 objects", "macro_f1"] < rows["plain", "4 objects", "macro_f1"]
    one = next(one for one in table.baselines() if one.objects == 4)
    assert one.variant == BASELINES
    data = table.sizers.datamodule.variant(seed=one.seed, train_objects=4)
    train = data.load().frames.iloc[data.rows("train")].drop_duplicates("unique_id")
    kept = pd.read_parquet(table.path(one))
    constant = kept.loc[kept["variant"] == "constant", "predicted_mm"]
    assert np.allclose(constant, train["gt"].median())
    assert len(constant) == 12
