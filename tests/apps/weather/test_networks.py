"""Networks are named by all that decides them, found, and never taken for others."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from apps.main import main
from apps.weather.commands import DEFAULT_BUDGET
from apps.weather.networks import (
    Networks,
    Training,
    complete,
    fit_piece,
    fitted,
    form_of,
    network_piece,
    optimizers_of,
    pinned_network,
    untrained_rows,
)
from apps.weather.scoring import Budget, Tuning
from harness.experiment import Choice, Job, SettingsDiffer
from harness.experiment.run import CHOICES
from weather.models.adas.analysis import AnalysisForm
from weather.models.adas.presets import FORMS

PATHS = "--data.source.init_args.recording", "--data.source.init_args.world.init_args.path"


def never(*_):
    raise AssertionError("nothing is to be computed")


@pytest.mark.parametrize(
    ("config", "budget"),
    [("era5_ensemble", DEFAULT_BUDGET), ("osse_shallow_water", Budget(trials=8))],
)
def test_a_packaged_configuration_finds_all_its_shipped_results(
    config, budget, configured, monkeypatch, capsys
):
    found = configured(config)
    if config.startswith("osse"):  # nature takes minutes, and decides no name
        world = found.source.world
        world._nature = torch.randn(12, world.num_members, 3, 32, 64)
    monkeypatch.setattr("apps.weather.scoring.Tuning.trial", never)
    tuning = Tuning(found.source, Training(found.model, found.data), budget.densities, budget)
    classical = tuning.classical(found.run)
    tuned = [method for method in found.source.methods(found.source.tasks()[0].name) if method.box]
    assert len(classical) == len(tuned) * len(found.source.tasks())
    forms = found.source.forms
    choices = tuning.networks(found.run, forms, (0, 1, 2))
    assert set(choices) == set(forms)
    networks = Networks(found.run, optimizers_of(found.run, forms, (0, 1, 2), choices),
                        (0, 1, 2), found.source.test_objects())  # fmt: skip
    assert len(networks.pieces) == 3 * len(forms)
    assert networks.store.missing(networks.pieces.values()) == []
    for form in forms:
        network = networks.load(form, 2)
        assert FORMS[form].items() <= network.network.arguments.items()
        assert not network.training
    records = map(networks.store.record, networks.pieces.values())
    assert {record.origin for record in records} == {"migrated"}
    assert "missing" not in capsys.readouterr().out
    assert not (found.run.folder / CHOICES).exists()


def test_the_piece_of_fit_is_that_of_evaluate(configured):
    plain, seeded = configured("unit"), configured("unit", "--seed_everything", 3)
    moved = configured("unit", *(word for path in PATHS for word in (path, "elsewhere")))
    same = configured("unit", "--seed_everything", 3, "--data.source.init_args.seed", 3)
    piece = network_piece(plain.run, "adas_increment", 0)
    for found, given, expected in ((plain, 0, piece), (moved, 0, piece), (seeded, 3, None)):
        found.run.settings["seed"] = given
        made = fit_piece(found.run)
        assert (made == piece, made.seed) == (expected is piece, 0)
    same.run.settings["seed"] = 3
    assert fit_piece(same.run) == network_piece(plain.run, "adas_increment", 3)
    assert "seed" not in same.run.settings
    there = [("a", 0), ("a", 2), ("b", 2)]
    assert complete(there, (0, 1, 2), ("a", "b", "c")) == ((0, 2), ("a",))
    assert network_piece(plain.run, "adas_increment", 0, {"learning_rate": 0.1}) != piece
    assert network_piece(configured("unit", "--data.steps", 15).run, "adas_increment", 0) != piece


@pytest.mark.parametrize("form", tuple(FORMS))
def test_the_command_of_a_missing_network_trains_it(form, configured):
    plain = configured("unit")
    networks = Networks(plain.run, {form: {}}, [3])
    (row,) = untrained_rows(plain.run, networks, plain.source, (0.1,))
    command = row.note.partition("`")[2].partition("`")[0].split()
    assert command[:5] == ["gates", "weather", "fit", "--config", "unit"]
    trained = configured("unit", *command[5:])
    trained.run.settings["seed"] = 3
    assert fit_piece(trained.run) == networks.pieces[form, 3]


def test_a_network_of_no_form_has_a_piece_of_its_own(configured):
    found = configured("unit", "--model.network.output", "analysis", "--model.network.gated", "no")
    assert form_of(found.run.settings) is None
    assert fit_piece(found.run) is None
    official = configured("unit", "--model.network.output", "analysis")
    assert form_of(official.run.settings) == "adas_official"


def keep(found, form, seed, optimizer=None, objects=()):
    piece = network_piece(found.run, form, seed, optimizer)
    analysis = found.model.variant(form).analysis
    found.run.store("weights", AnalysisForm()).keep(piece, analysis, objects=objects)
    return analysis


def test_results_of_other_settings_are_never_loaded(configured, refused):
    found, other = configured("unit"), configured("unit", "--data.steps", 15)
    keep(found, "ungated", 0)
    networks = Networks(other.run, {"ungated": {}}, [0])
    refused(
        r"ungated-s0 was made with .*data.steps 14, now 15",
        networks.load,
        "ungated",
        0,
        error=SettingsDiffer,
    )
    tuned = Networks(found.run, {"ungated": {"learning_rate": 0.5}}, [0])
    refused(
        r"model.learning_rate 0.003, now 0.5",
        tuned.obtain,
        found.run,
        Training(found.model, found.data),
        error=SettingsDiffer,
    )


def test_what_was_trained_on_test_members_is_never_scored(configured, refused):
    found = configured("unit")
    test = found.source.test_objects()
    assert not set(test) & set(found.data.training_objects())
    keep(found, "ungated", 0, objects=[*found.data.training_objects(), test[0]])
    networks = Networks(found.run, {"ungated": {}}, [0], test)
    refused("was trained on 1 of the 1 objects that it is to be test", networks.load, "ungated", 0)


@pytest.mark.parametrize("copied", ["weights.safetensors", "checkpoints/last.safetensors"])
def test_a_given_network_trained_on_test_members_is_never_scored(
    configured, tmp_path, copied, refused
):
    found = configured("unit")
    test = found.source.test_objects()
    for objects, name in (([*found.data.training_objects(), test[0]], "bad"), (["a"], "good")):
        keep(found, "ungated", 0, objects=objects)
        kept = found.run.store("weights", AnalysisForm()).folder / "ungated-s0"
        path = tmp_path / name / copied
        path.parent.mkdir(parents=True)
        shutil.copy(kept / "record.json", tmp_path / name)
        shutil.copy(kept / AnalysisForm.FILE, path)
    refused(
        "was trained on 1 of the 1 test objects of this conf",
        pinned_network,
        tmp_path / "bad" / copied,
        found.model,
        "ungated",
        test,
    )
    assert pinned_network(tmp_path / "good" / copied, found.model, "ungated", test) is not None


def test_a_checkpoint_far_from_its_run_still_knows_its_training_members(
    configured, tmp_path, refused
):
    found = configured("unit")
    test = found.source.test_objects()
    weights = {
        f"analysis.{n}": v for n, v in found.model.variant("ungated").analysis.state_dict().items()
    }
    for objects, name in ((test, "bad.ckpt"), (["a"], "good.ckpt")):
        states = {"FolderClaim": {"objects": list(objects)}}
        torch.save({"state_dict": weights, "callbacks": states}, tmp_path / name)
    refused(
        "was trained on 1 of the 1 test objects of this conf",
        pinned_network,
        tmp_path / "bad.ckpt",
        found.model,
        "ungated",
        test,
    )
    assert pinned_network(tmp_path / "good.ckpt", found.model, "ungated", test) is not None


def test_members_of_another_nature_are_other_objects(configured):
    unit = configured("unit").source
    world = "--data.source.init_args.world.init_args"
    other = configured("unit", f"{world}.seed", 1).source
    assert not set(unit.training_objects()) & set(other.training_objects())
    era5 = configured("era5_ensemble").source
    assert len(set(era5.training_objects())) == len(set(era5.test_objects())) == 20
    assert not set(era5.training_objects()) & set(era5.test_objects())


def test_a_network_of_fit_keeps_the_configured_optimizer(configured):
    found = configured("unit")
    tuned = {
        form: Choice({"learning_rate": 0.5, "weight_decay": 0.1}, [], []) for form in tuple(FORMS)
    }
    seeds = (0, 1)
    assert fitted(found.run, tuple(FORMS), seeds) == []
    before = optimizers_of(found.run, tuple(FORMS), seeds, tuned)
    assert before == dict.fromkeys(tuple(FORMS), tuned["ungated"].setting)
    keep(found, "ungated", 1)
    keep(found, "adas_official", 0, tuned["adas_official"].setting)
    assert fitted(found.run, tuple(FORMS), seeds) == ["ungated"]
    assert optimizers_of(found.run, tuple(FORMS), seeds, tuned)["ungated"] == {}
    assert optimizers_of(found.run, tuple(FORMS), seeds, {})["adas_official"] == {}


@pytest.mark.costly("one network is trained twice")
def test_evaluate_trains_the_same_bits_as_fit(configured, tmp_path):
    words = []
    for path in PATHS:
        words += [path, tmp_path / path.rpartition(".")[2]]
    words += ["--data.steps", 7]
    found = configured("unit", *words)
    options = ["--config", "unit", "--root", tmp_path / "runs", *words]
    options += ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
    assert main(["weather", "fit", *map(str, options)]) == 0
    found.data.source.setup()
    ticks, folder = [], tmp_path / "job"
    folder.mkdir()
    job = Job(folder, lambda: ticks.append(1))
    piece = network_piece(found.run, "adas_increment", 0)
    analysis = Training(found.model, found.data).train(piece, job)
    assert len(ticks) == found.data.steps
    assert job.objects == set(found.data.training_objects())
    store = found.run.store("weights", AnalysisForm())
    assert set(store.record(piece).objects) == job.objects
    AnalysisForm().save(folder, analysis)
    one, two = (load_file(at / AnalysisForm.FILE) for at in (store.find(piece), folder))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_training_shorter_than_its_validations_is_refused(configured, tmp_path, refused):
    found = configured("unit", "--data.steps", 2)
    piece = network_piece(found.run, "ungated", 0)
    refused(
        "val_check_interval is 7, but there are 2 steps: set",
        Training(found.model, found.data).train,
        piece,
        Job(tmp_path),
    )
