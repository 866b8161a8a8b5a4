"""A stored network is used only for the settings and the objects that it was trained with."""

import json
import shutil
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from apps.endoscopy.provenance import Recipe

from apps.endoscopy import commands as endoscopy
from apps.endoscopy.rendering import MAIN, Rendering
from apps.endoscopy.training import BestWeights, Sizers, Training, keep_fit
from apps.endoscopy.weights import find_bundle
from core_gates.errors import GatesError
from endoscopy.bundles.building import part_predictions
from endoscopy.bundles.contents import load_bundle, read_training
from endoscopy.data.datamodule import PolypSizingDataModule
from endoscopy.models import tiny_resnet
from endoscopy.renderer.config import RendererConfig
from endoscopy.renderer.dataset import render_dataset
from endoscopy.training.module import SizingModule
from endoscopy.training.targets import LogSize
from harness.command.verbs import Place
from harness.runs.folder import RunFolder

COUNTS = {"train_objects": 6, "validation_objects": 2, "test_objects": 8, "split": "counts"}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    root = tmp_path_factory.mktemp("rendered") / "set"
    list(render_dataset(root, RendererConfig(side=32, frames=1), 16))
    return root


@pytest.fixture
def make(rendered, tmp_path):
    """``make(**changes)``: sizers of a small network; ``gates``, ``epochs`` or data may differ."""

    def build(epochs=2, recipe=None, overwrite=False, gates="fsg", beta=0.1, **data):
        torch.manual_seed(0)
        widths = {"widths": [4, 4, 8], "depths": [1, 1]}
        model = tiny_resnet(("rgb_mask",), gates=gates, trunk_options=widths)
        routing = "off" if gates == "none" else "dual"
        module = SizingModule(model, LogSize(beta=beta), gradient_routing=routing)
        options = {"synthetic": str(rendered), "streams": ["rgb_mask"], "size": 32} | COUNTS
        frames = PolypSizingDataModule(**options | data)
        folder = RunFolder("endoscopy", "run", tmp_path / "runs", overwrite=overwrite)
        return Sizers(folder, "here", module, frames, epochs, None, None, recipe)

    return build


def fitted(sizers):
    """What ``fit`` leaves, without a training."""
    sizers.datamodule.setup("fit")
    return keep_fit(sizers)


def test_a_network_is_found_by_what_it_was_trained_with(make, rendered, tmp_path):
    folder = fitted(make())
    assert folder.name == "configured-s0"
    assert make().path(Training()) == folder
    shutil.copytree(rendered, tmp_path / "moved")
    moved = {"synthetic": str(tmp_path / "moved"), "cache_folder": "else", "num_workers": 3}
    assert make(**moved).path(Training()) == folder
    config = json.loads((folder / "config.json").read_text())
    assert len(config["training"]["objects"]) == 6
    assert config["training"]["fingerprint"] == read_training(folder).fingerprint


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"epochs": 9}, "trainer.max_epochs 2, now 9"),
        ({"gates": "none"}, "model.model.gates fsg, now none"),
        ({"beta": 0.2}, "model.target"),
        ({"split_seed": 7}, "data.split_seed 1, now 7"),
        ({"batch_size": 4}, "data.batch_size 32, now 4"),
        ({"recipe": Recipe(monitor="val/mae_mm")}, "checkpoint.monitor null, now val/mae_mm"),
    ],
)
def test_other_settings_are_refused_or_trained_anew(make, change, told):
    folder = fitted(make())
    with pytest.raises(GatesError, match="was trained with other settings") as refusal:
        make(**change).missing([Training()])
    assert told in str(refusal.value)
    assert "--overwrite" in str(refusal.value)
    anew = make(**change, overwrite=True)
    assert anew.missing([Training()]) == [Training()]
    assert told in anew.reasons([Training()])
    assert read_training(folder) is not None  # nothing is removed before it is replaced


def test_a_network_that_does_not_tell_its_settings_is_refused(make):
    folder = fitted(make())
    config = json.loads((folder / "config.json").read_text())
    del config["training"]
    (folder / "config.json").write_text(json.dumps(config))
    assert load_bundle(folder).training is None
    with pytest.raises(GatesError, match="its settings are not known"):
        make().path(Training())


def test_networks_of_the_package_are_used_only_if_they_fit(make, monkeypatch, tmp_path):
    fitted(make()).rename(tmp_path / "configured-s0")
    monkeypatch.setattr(Sizers, "shipped", tmp_path)
    assert make().path(Training()) == tmp_path / "configured-s0"
    other = make(epochs=9)
    assert other.missing([Training()]) == [Training()]
    assert "trainer.max_epochs 2, now 9" in other.reasons([Training()])


def test_the_network_of_one_fold_is_not_that_of_another(make, tmp_path):
    folds = {"split": "made", "num_folds": 4, "level": "lesion"}
    folder = fitted(make(fold=1, **folds))
    assert folder.name == "configured-f1-s0"
    sizers = make(**folds)
    assert sizers.path(Training(fold=1)) == folder
    assert sizers.missing([Training(), Training(fold=0)]) == [Training(fold=0)]
    assert find_bundle(Place(RunFolder("endoscopy", "run", tmp_path / "runs"), "here"), None).name
    with pytest.raises(GatesError, match=r"trained on \d of 4 test objects"):
        part_predictions(load_bundle(folder), sizers.data(Training(fold=0)), "test")


def test_test_objects_that_were_trained_on_are_refused(make):
    pinned = make(split_seed=7)
    pinned.pinned = fitted(make())
    with pytest.raises(GatesError, match=r"trained on \d of 8 test objects"):
        pinned.load(Training())
    pinned = make()
    pinned.pinned = fitted(make())
    assert pinned.load(Training()).training.objects


def test_shipped_networks_fit_the_shipped_configuration(monkeypatch, tmp_path):
    seen = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        endoscopy, "score", lambda sizers, *_, **options: seen.append((sizers, options))
    )
    endoscopy.main(["evaluate", "--config", "synthetic"])
    ((sizers, options),) = seen
    trainings = [Training(v, s) for v in options["variants"] for s in options["seeds"]]
    assert sizers.missing(trainings) == []
    shipped = Path(str(files("endoscopy"))) / "weights" / "synthetic"
    assert sorted(t.name for t in trainings) == sorted(path.name for path in shipped.iterdir())
    assert all(len(read_training(shipped / t.name).objects) == 150 for t in trainings)


def test_shipped_runs_of_the_honest_table_fit_its_configuration(monkeypatch, tmp_path):
    seen = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(endoscopy, "score_honest", lambda table, *_: seen.append(table))
    endoscopy.main(["evaluate", "--config", "honest"])
    (table,) = seen
    assert table.missing() == []
    assert len(table.trainings()) == 90
    (plain,) = (
        row
        for row in table.rows()
        if row.method == "plain" and "700" in row.task and row.metric == "macro_f1"
    )
    assert 0.9 < plain.value < 0.92
    endoscopy.main(["evaluate", "--config", "honest", "--steps", "800"])
    assert len(seen[1].missing()) == 90


def test_the_best_weights_are_those_of_the_best_score():
    module = torch.nn.Linear(1, 1)
    for mode, scores, expected in (("min", [3, 1, 2], 1), ("max", [float("nan"), 3, 3], 1)):
        best = BestWeights(Recipe(monitor="val/x", mode=mode))
        for number, score in enumerate(scores):
            torch.nn.init.constant_(module.weight, number)
            best.on_validation_end(SimpleNamespace(callback_metrics={"val/x": score}), module)
        assert best.weights["weight"].item() == expected
    with pytest.raises(GatesError, match="'val/x' is not logged; logged are val/y"):
        best.on_validation_end(SimpleNamespace(callback_metrics={"val/y": 1.0}), module)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_trainings_follow_the_configured_trainer(make):
    """Precision and the choice of the best weights are those of ``fit``."""
    options = {"precision": "bf16-mixed", "check_val_every_n_epoch": 1}
    plain, _ = make().fit(Training(), tick=lambda: None)
    assert plain.trainer.precision == "32-true"
    assert plain.trainer.limit_val_batches == 0
    chosen, _ = make(recipe=Recipe(options, "val/mae_mm")).fit(Training(), tick=lambda: None)
    assert chosen.trainer.precision == "bf16-mixed"
    (best,) = [c for c in chosen.trainer.callbacks if isinstance(c, BestWeights)]
    for name, value in chosen.state_dict().items():
        assert torch.equal(value, best.weights[name])
    last, _ = make(recipe=Recipe(options, "val/mae_mm")).fit(Training(), tick=lambda: None, steps=1)
    assert last.trainer.global_step == 1
    assert not any(isinstance(c, BestWeights) for c in last.trainer.callbacks)


@pytest.mark.parametrize("option", ["table", "split_file"])
def test_a_missing_source_is_found_before_anything_is_rendered(make, tmp_path, option):
    changes = {option: str(tmp_path / "absent.csv"), "synthetic": str(tmp_path / "new")}
    data = make(**changes).datamodule
    with pytest.raises(GatesError, match=rf"^data\.{option}: \S+absent.csv is absent; name"):
        Rendering(frames=1).render(data, [MAIN])
    assert not (tmp_path / "new").exists()
