"""A stored network is used only for the settings and the objects that it was trained with."""

import json
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from apps.endoscopy import commands as endoscopy
from apps.endoscopy.training_runs import Trainings, find_bundle, render, trained, training_of
from core_gates import GatesError
from endoscopy import SizingModule
from endoscopy.bundles.bundle_fitting import bundle_of, part_predictions, shipped_folder
from endoscopy.bundles.sizing_bundle import load_bundle
from endoscopy.data.sizing_datamodule import PolypSizingDataModule
from endoscopy.experiments.sizers import MAIN, Rendering, Sizers, Training, taking_part
from endoscopy.models import tiny_resnet
from endoscopy.renderer import RendererConfig, render_dataset
from endoscopy.training.targets import LogSize
from harness.command.verbs import Place
from harness.experiment import Job, Run, SettingsDiffer
from harness.files.piece import read_record
from harness.runs.folder import RunFolder

COUNTS = {"train_objects": 6, "validation_objects": 2, "test_objects": 8, "split": "counts"}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    root = tmp_path_factory.mktemp("rendered") / "set"
    list(render_dataset(root, RendererConfig(side=32, frames=1), 16))
    return root


@pytest.fixture
def make(rendered, tmp_path):
    """``make(**changes)``: training runs of a small network; ``gates``, ``epochs``, data differ."""

    def build(epochs=2, overwrite=False, gates="fsg", beta=0.1, settings=(), **data):
        torch.manual_seed(0)
        widths = {"widths": [4, 4, 8], "depths": [1, 1]}
        model = tiny_resnet(("rgb_mask",), gates=gates, trunk_options=widths)
        routing = "off" if gates == "none" else "dual"
        module = SizingModule(model, LogSize(beta=beta), gradient_routing=routing)
        options = {"synthetic": str(rendered), "streams": ["rgb_mask"], "size": 32} | COUNTS
        sizers = Sizers(module, PolypSizingDataModule(**options | data))
        trainer = {"trainer.max_epochs": epochs} | dict(settings)
        run = Run(
            tmp_path / "runs/endoscopy/run",
            app="endoscopy",
            overwrite=overwrite,
            settings=trainer | {"data.cache_folder": "else", "seed": 3},
        )
        return Trainings(run, sizers)

    return build


def kept(trainings):
    """Keep an untrained network as if it had been trained."""
    data = trainings.sizers.datamodule
    data.setup("fit")
    (piece,) = trainings.pieces([Training()])
    bundle = bundle_of(trainings.sizers.untrained(Training()), data, settings=piece.settings)
    return trainings.store.keep(piece, bundle, objects=data.training_objects())


def missing(trainings, *wanted):
    return [training_of(one) for one in trainings.store.missing(trainings.pieces(wanted))]


def test_a_network_is_found_by_what_it_was_trained_with(make, rendered, tmp_path):
    folder = kept(make())
    assert folder.name == "configured-s0"
    assert missing(make(), Training()) == []
    shutil.copytree(rendered, tmp_path / "moved")
    moved = {"synthetic": str(tmp_path / "moved"), "cache_folder": "else", "num_workers": 3}
    assert missing(make(**moved), Training()) == []
    record = read_record(folder)
    assert len(record.objects) == 6
    bundle = make().load(Training())
    assert list(bundle.training.objects) == list(record.objects)
    assert bundle.training.settings == record.settings


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"epochs": 9}, "trainer.max_epochs 2, now 9"),
        ({"gates": "none"}, "model.model.gates fsg, now none"),
        ({"beta": 0.2}, "model.target"),
        ({"split_seed": 7}, "data.split_seed 1, now 7"),
        ({"batch_size": 4}, "data.batch_size 32, now 4"),
        ({"settings": {"checkpoint.monitor": "val/mae_mm"}}, "checkpoint.monitor null, now val/"),
    ],
)
def test_results_of_other_settings_are_never_scored(make, change, told):
    folder = kept(make())
    with pytest.raises(SettingsDiffer, match="was made with other settings") as refusal:
        missing(make(**change), Training())
    assert told in str(refusal.value)
    changed = make(**change)
    changed.sizers.datamodule.setup("test")
    with pytest.raises(SettingsDiffer):
        changed.load(Training())
    anew = make(**change, overwrite=True)
    assert missing(anew, Training()) == [Training()]
    assert told in anew.store.reasons(anew.pieces([Training()]))[0]
    assert read_record(folder) is not None  # nothing is removed before it is replaced


def test_the_network_of_one_fold_is_not_that_of_another(make, tmp_path, refused):
    folds = {"split": "made", "num_folds": 4, "level": "object"}
    assert kept(make(fold=1, **folds)).name == "configured-f1-s0"
    other = make(**folds)
    assert missing(other, Training(fold=1)) == []
    assert missing(other, Training(), Training(fold=0)) == [Training(fold=0)]
    place = Place(RunFolder("endoscopy", "run", tmp_path / "runs"), "here")
    bundle = find_bundle(place, None).bundle
    refused(
        r"trained on \d of 4 test objects",
        part_predictions,
        bundle,
        other.sizers.data(Training(fold=0)),
        "test",
    )


def test_a_network_trained_on_test_objects_is_refused(make, refused):
    folder = kept(make())
    record = read_record(folder)
    other = make(split_seed=7)
    (piece,) = other.pieces([Training()])
    record._replace(fingerprint=piece.fingerprint, settings=piece.settings).write(folder)
    refused(r"configured-s0 was trained on \d of the 8 objects", other.load, Training())
    bundle = load_bundle(folder)
    refused(r"trained on \d of 8 test objects", other.sizers.pinned(bundle), Training())
    assert make().sizers.pinned(bundle)(Training()) is bundle


@pytest.fixture
def seen(monkeypatch, tmp_path):
    """``seen(words)``: what ``evaluate`` hands on: run, networks and what is wanted."""
    found = []
    monkeypatch.chdir(tmp_path)
    for name in ("score", "score_honest"):
        monkeypatch.setattr(endoscopy, name, lambda *given, **_: found.append(given))

    def evaluate(*words):
        endoscopy.main(["evaluate", *words])
        return found.pop()

    return evaluate


def test_shipped_networks_fit_the_shipped_configuration(seen):
    run, sizers, wanted = seen("--config", "synthetic")
    trainings = Trainings(run, sizers)
    pieces = trainings.pieces(Training(v, s) for v in wanted.variants for s in wanted.seeds)
    assert (len(pieces), trainings.store.missing(pieces)) == (9, [])
    shipped = Path(str(files("endoscopy"))) / "weights" / "synthetic" / "weights"
    assert sorted(piece.name for piece in pieces) == sorted(path.name for path in shipped.iterdir())
    records = [trainings.store.record(piece) for piece in pieces]
    assert {(record.origin, len(record.objects)) for record in records} == {("migrated", 150)}
    for piece, record in zip(pieces, records, strict=True):
        config = json.loads((shipped_folder("synthetic", piece.name) / "config.json").read_text())
        assert sorted(config["training"]["objects"]) == record.objects
    run, sizers, _ = seen("--config", "synthetic", "--shipped", "false")
    assert len(Trainings(run, sizers).store.missing(pieces)) == 9


@pytest.mark.fault("46 E1")
def test_only_some_variants_take_part(seen, refuses):
    _, _, wanted = seen("--config", "synthetic", "--only", "[crop]")
    assert wanted.variants == ("crop",)
    refuses(
        GatesError,
        (
            "--only is 'croq'; choose one of configured, ",
            lambda: seen("--config", "synthetic", "--only", "[croq]"),
        ),
        (
            "--only is 'crop'; choose one of plain, dual",
            lambda: taking_part(("plain", "dual"), ("plain", "crop")),
        ),
        ("variant is 'croq'; choose one of", lambda: taking_part(("plain", "croq"))),
        ("evaluate.variants is empty", lambda: taking_part((), ("crop",))),
    )


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_trainings_follow_the_configured_trainer(make, tmp_path):
    """Precision and the choice of the best weights are those of ``fit``."""

    def train(name, trainings, **settings):
        (piece,) = trainings.pieces([Training()])
        piece = trainings.run.piece("configured", 0, **settings)
        module, _ = trained(piece, Job(tmp_path / name), trainings.sizers)
        return module

    plain = train("plain", make())
    assert (plain.trainer.precision, plain.trainer.limit_val_batches) == ("32-true", 0)
    options = {"trainer.precision": "bf16-mixed", "checkpoint.monitor": "val/mae_mm"}
    chosen = train("chosen", make(settings=options))
    assert chosen.trainer.precision == "bf16-mixed"
    best = torch.load(tmp_path / "chosen/fit0/best.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, best[name]) for name, value in chosen.state_dict().items())
    assert train("last", make(), **{"trainer.max_steps": 1}).trainer.global_step == 1


@pytest.mark.fault("endoscopy A4")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_statistics_behind_noisy_gates_are_measured_as_in_evaluation(make, tmp_path):
    """The running statistics are those of the training batches under deterministic gates."""
    trainings = make()
    means = {}
    for variant in ("l0", "plain"):
        (piece,) = trainings.pieces([Training(variant)])
        module, data = trained(piece, Job(tmp_path / variant), trainings.sizers)
        last = torch.load(tmp_path / variant / "fit0/last.ckpt", weights_only=True)["state_dict"]
        name = next(n for n in reversed(last) if n.endswith("running_var"))
        means[variant] = (module.state_dict()[name], last[name], piece)
        assert not module.model.training
        if variant == "l0":
            before = {n: v.clone() for n, v in module.state_dict().items()}
            trainings.sizers.settle("l0", module, data)
            assert all(torch.equal(v, before[n]) for n, v in module.state_dict().items())
    same = {variant: torch.equal(*found[:2]) for variant, found in means.items()}
    assert same == {"l0": False, "plain": True}
    assert [means[name][2].get("version") for name in same] == [2, None]


@pytest.mark.parametrize("option", ["table", "split_file"])
def test_a_missing_source_is_found_before_anything_is_rendered(make, tmp_path, option, refused):
    changes = {option: str(tmp_path / "absent.csv"), "synthetic": str(tmp_path / "new")}
    data = make(**changes).sizers.datamodule
    refused(
        rf"^data\.{option}: \S+absent.csv does not exist: name",
        render,
        data,
        Rendering(frames=1),
        [MAIN],
    )
    assert not (tmp_path / "new").exists()


@pytest.mark.fault("endoscopy C14")
def test_a_run_of_several_folds_says_whose_network_it_takes(tmp_path):
    shipped = Path(str(files("endoscopy"))) / "weights/synthetic/weights/configured-s0"
    folder = RunFolder("endoscopy", "folds", tmp_path / "runs")
    place = Place(folder, "table")
    shutil.copytree(shipped, folder.path / "weights/configured-f1-s0")
    assert find_bundle(place, None).name.endswith("configured-f1-s0")
    shutil.copytree(shipped, folder.path / "weights/configured-f0-s0")
    name = find_bundle(place, None).name
    assert name.endswith("configured-f0-s0 (one of 2 folds; --weights takes another)")
