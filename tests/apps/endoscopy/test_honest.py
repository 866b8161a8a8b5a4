"""Runs and trials of the honest table are used only for the settings they were made with."""

import shutil
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from apps.endoscopy import commands as endoscopy
from apps.endoscopy import size_scoring
from apps.endoscopy.size_scoring import (
    BASELINES,
    RUNS,
    baseline_pieces,
    fixed,
    run_pieces,
    score_honest,
    spaces,
)
from core_gates import GatesError
from endoscopy import SizingModule
from endoscopy.data.sizing_datamodule import PolypSizingDataModule
from endoscopy.evaluation.baselines import REGRESSION
from endoscopy.experiments.scored_predictions import Budget
from endoscopy.experiments.sizers import Sizers
from endoscopy.models import tiny_resnet
from endoscopy.renderer import RendererConfig, render_dataset
from harness.experiment import Run, SettingsDiffer, Table, read_scores
from harness.files.piece import read_record

RATES = [{"learning_rate": 1e-3}, {"learning_rate": 2e-3}]
TRIALS = {"plain": RATES, "dual": RATES}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    root = tmp_path_factory.mktemp("rendered") / "set"
    list(render_dataset(root, RendererConfig(side=32, frames=2), 24))
    return root


def fake_trial(piece, job, *, sizers):
    """The second rate is better."""
    job.tick()
    return {"score": 1 / piece["learning_rate"] / 1e4}


def fake_run(piece, job, *, sizers):
    """Predictions without a training."""
    job.tick()
    data = sizers.datamodule
    rows = data.load().frames.iloc[data.rows("test")].drop_duplicates("unique_id")
    draws = np.random.default_rng((piece.seed, len(piece.method), piece.keys["n"]))
    found = rows[["unique_id", "patient", "gt"]].reset_index(drop=True)
    return found.assign(predicted_mm=found["gt"] * np.exp(0.1 * draws.normal(size=len(found))))


def maker(rendered, folder, patch):
    """Run, networks and budget of two variants, sizes and seeds, without a training."""
    patch.setattr(size_scoring, "trial", fake_trial)
    patch.setattr(size_scoring, "predicted", fake_run)
    few = partial(size_scoring.HonestComparison, resamples=100)
    patch.setattr(size_scoring, "HonestComparison", few)
    patch.setattr(torch, "get_num_threads", lambda: 1)

    def build(steps=3, trials=TRIALS, variants=("plain", "dual"), quick=False, overwrite=False,
              name="run", **data):  # fmt: skip
        torch.manual_seed(0)
        widths = {"widths": [4, 4, 8], "depths": [1, 1]}
        module = SizingModule(tiny_resnet(("rgb_mask",), trunk_options=widths))
        counts = {"train_objects": 8, "validation_objects": 2, "test_objects": 12}
        options = {"synthetic": str(rendered), "streams": ["rgb_mask"], "size": 32} | counts
        sizers = Sizers(module, PolypSizingDataModule(**options | {"split": "counts"} | data))
        run = Run(folder / name, app="endoscopy", overwrite=overwrite, quick=quick)
        return run, sizers, Budget(variants, (0, 1), (4, 6), steps, trials, 4)

    return build


@pytest.fixture
def make(rendered, tmp_path, monkeypatch):
    return maker(rendered, tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def scored(rendered, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored")
    with pytest.MonkeyPatch.context() as patch:
        return score_honest(*maker(rendered, folder, patch)()).parent


@pytest.fixture
def finished(scored, tmp_path):
    """The folder of a finished comparison, that of ``make()``."""
    return shutil.copytree(scored, tmp_path / "run")


def test_what_is_finished_is_found(make, capsys):
    path = score_honest(*make())
    first = capsys.readouterr().out
    for kind, count in (("trials", 4), ("runs", 8), ("runs", 4)):
        assert f" {count} missing {kind}: " in first
    before = read_scores(path, "endoscopy").rows
    assert score_honest(*make()) == path
    assert "missing" not in capsys.readouterr().out
    assert read_scores(path, "endoscopy").rows == before
    settings = read_record(path.parent / RUNS / "plain-n4-s0").settings
    assert (settings["trainer.max_steps"], settings["learning_rate"]) == (3, 2e-3)
    assert "trainer.max_epochs" not in settings
    table = pd.read_parquet(path.parent / size_scoring.TUNING)
    assert (table["learning_rate"].tolist(), table["trials"].tolist()) == ([2e-3, 2e-3], [2, 2])


OTHER = {
    "more steps": ({"steps": 100}, "trainer.max_steps 3, now 100"),
    "another trial": ({"trials": {n: [{"learning_rate": 9e-3}] for n in TRIALS}}, "trials"),
    "another split": ({"split_seed": 5}, "data.split_seed 1, now 5"),
}


@pytest.mark.parametrize("case", OTHER)
@pytest.mark.usefixtures("finished")
def test_results_of_other_settings_are_refused_or_replaced(make, case, capsys):
    change, told = OTHER[case]
    with pytest.raises(SettingsDiffer, match="was made with other settings") as refusal:
        score_honest(*make(**change))
    assert told in str(refusal.value)
    capsys.readouterr()
    score_honest(*make(**change, overwrite=True))
    assert "making 8 missing runs: " in capsys.readouterr().out
    score_honest(*make(**change))
    assert "missing" not in capsys.readouterr().out


def test_variants_that_are_not_complete_are_left_out_of_a_short_look(make, finished, refused):
    (finished / "scores.json").unlink()
    for seed in (0, 1):
        folder = finished / RUNS / f"dual-n6-s{seed}"
        folder.rename(folder.with_name(f"gone{seed}"))
    scores = read_scores(score_honest(*make(quick=True)), "endoscopy")
    assert {row.method for row in scores.rows} == {"plain", "constant", "area", REGRESSION}
    assert scores.quick
    refused("there is no training run to compare", score_honest, *make(name="b", quick=True))


@pytest.mark.fault("endoscopy A1")
def test_a_training_on_test_objects_is_never_compared(make, finished, refused):
    """It is found without the rendered data, since what ships is predictions only."""
    _, sizers, _ = make()
    folder = finished / RUNS / "dual-n6-s1"
    record, (test, *_) = read_record(folder), sizers.datamodule.object_keys("test")
    assert test not in record.objects
    assert test in size_scoring.tested_objects(
        sizers.datamodule, pd.read_parquet(folder / Table.FILE)
    )
    record._replace(objects=[test]).write(folder)
    refused("dual-n6-s1 was trained on 1 of the 12 objects", score_honest, *make())


def test_a_table_that_nobody_can_compare_is_refused(make, refuses):
    refuses(
        GatesError,
        ("must contain 'plain'", lambda: score_honest(*make(variants=("dual",), trials={}))),
        ("as many trials, found", lambda: score_honest(*make(trials={"plain": RATES}))),
        (
            "variant is 'twofold'; choose one of",
            lambda: score_honest(*make(variants=("plain", "twofold"), trials={})),
        ),
    )


def test_baselines_stand_at_every_size(make, finished):
    run, sizers, budget = make()
    scores = read_scores(finished / "scores.json", "endoscopy")
    rows = {(row.method, row.task, row.metric): row.value for row in scores.rows if not row.versus}
    area, regression = (
        [rows[name, f"{size} objects", "mape"] for size in (4, 6)] for name in ("area", REGRESSION)
    )
    assert area[0] != area[1]
    assert not set(regression) & {*area, rows["constant", "4 objects", "mape"]}
    assert regression[0] != regression[1]
    assert "the regression on area and brightness" in scores.headline
    assert rows["constant", "4 objects", "macro_f1"] < rows["plain", "4 objects", "macro_f1"]
    one = next(one for one in baseline_pieces(sizers, budget) if one.keys["n"] == 4)
    assert one.method == BASELINES
    data = sizers.datamodule.variant(seed=one.seed, train_objects=4)
    train = data.load().frames.iloc[data.rows("train")].drop_duplicates("unique_id")
    kept = run.store(RUNS, Table()).load(one)
    constant = kept.loc[kept["variant"] == "constant", "predicted_mm"]
    assert np.allclose(constant, train["gt"].median())
    assert len(constant) == 12
    assert scores.headline.startswith("With 6 training objects, constant: macro F1")


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """Everything of the package for ``evaluate --config honest``, whose data are not rendered."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("honest"))
        patch.setattr(endoscopy, "score_honest", lambda *given: seen.append(given))
        endoscopy.main(["evaluate", "--config", "honest"])
        run, sizers, budget = seen.pop()
        run.settings = size_scoring.decisive(run.settings, sizers)
    return run, sizers, budget


def test_shipped_runs_of_the_honest_table_fit_its_configuration(shipped):
    run, sizers, budget = shipped
    run.quick = True  # nothing is tuned
    chosen = run.tune(
        spaces(budget, sizers),
        partial(size_scoring.trial, sizers=sizers),
        trials=4,
        objects=150,
        **fixed(budget),
    )
    assert {len(choice.trials) for choice in chosen.values()} == {4}
    assert [one["score"] for one in chosen["plain"].trials][3] == pytest.approx(0.1030430557)
    assert chosen["plain"].setting == {"learning_rate": 4e-3}
    store = run.store(RUNS, Table())
    wanted = [*run_pieces(run, sizers, budget, chosen), *baseline_pieces(sizers, budget)]
    assert (len(wanted), store.missing(wanted)) == (90 + 15, [])
    table = store.load(next(piece for piece in wanted if piece.name == "plain-n700-s0"))
    assert len(table) == 1000
    baselines = store.load(next(piece for piece in wanted if piece.name == "baselines-n700-s0"))
    assert set(baselines["variant"]) == {"constant", "area", REGRESSION}


@pytest.mark.fault("endoscopy A4")
def test_every_gate_of_the_honest_table_has_its_rate_tuned(shipped):
    _, sizers, budget = shipped
    searched = spaces(budget, sizers)
    for name in {"dual", "joint", "l0"}:
        assert len({one["gate_learning_rate"] for one in searched[name]}) > 1
    assert len({len(space) for space in searched.values()}) == 1
    assert {one["version"] for one in searched["l0"]} == {2}
