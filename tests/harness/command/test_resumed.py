"""A training that is resumed is the same training, or it is refused before a file is touched."""

import json
import shutil

import pytest
import torch

from apps.main import App, main
from harness.experiment import Arrays
from harness.files import sha256
from harness.files.piece import read_record
from harness.runs.callbacks import seen

OPTIONS = ["--trainer.enable_model_summary", "false", "--trainer.accelerator", "cpu"]
OPTIONS += ["--trainer.enable_progress_bar", "false", "--trainer.logger", "false"]
TABLE = {"toy": App("toy", "a toy", {"fit": "train", "distill": "train", "score": "score"})}


@pytest.fixture
def run(toy, tmp_path, monkeypatch):
    """``run(verb, *words)`` returns the exit code of a verb of the toy in a separate folder."""
    monkeypatch.chdir(tmp_path)
    return lambda verb, *words: main(["toy", verb, *OPTIONS, "--name", "a", *words], TABLE)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Where the training of one epoch is kept for the tests that begin with it."""
    return tmp_path_factory.mktemp("kept") / "a"


@pytest.fixture
def trained(run, kept, tmp_path):
    folder = tmp_path / "runs/toy/a"
    if kept.exists():
        shutil.copytree(kept, folder)
    else:
        assert run("fit", "--trainer.max_epochs", "1") == 0
        shutil.copytree(folder, kept)


@pytest.fixture
def untouched(run, tmp_path, capsys):
    """``untouched(*words)`` is what a ``fit`` of this exit code, which changes no file, prints."""

    def printed(*words, code=2):
        before = contents(tmp_path)
        assert (run("fit", *words), contents(tmp_path)) == (code, before)
        return capsys.readouterr()

    return printed


@pytest.mark.fault("endoscopy A1")
def test_another_training_is_refused_before_a_file_is_touched(run, untouched):
    assert run("fit", "--trainer.max_epochs", "2") == 0
    for words, said in (
        (["--seed_everything", "1"], "seed 0, now 1"),
        (["--model.lr", "0.5"], "model.lr 0.05, now 0.5"),
        (["--data.batch_size", "4"], "data.batch_size 8, now 4"),
        (["--data.num_samples", "48"], "data.num_samples 52, now 48"),
        (["--trainer.max_epochs", "1"], "trainer.max_epochs 2, now 1"),
        (["--trainer.gradient_clip_val", "1"], "trainer.gradient_clip_val null, now 1"),
    ):
        error = untouched("--resume", "--trainer.max_epochs", "2", *words).err
        assert said in error
        assert "--name NEW" in error
        assert error.count("\n") == 1


GATHERING = "lightning.pytorch.callbacks.GradientAccumulationScheduler"
WATCHING = ("--trainer.callbacks+=lightning.pytorch.callbacks.ModelSummary",)


@pytest.mark.fault("video H5")
def test_callbacks_decide_what_is_trained(run, untouched, tmp_path, capsys):
    folder = tmp_path / "runs/toy/a"
    epochs = ("--trainer.max_epochs", "2")
    gathering = (f"--trainer.callbacks+={GATHERING}", "--trainer.callbacks.scheduling={0: 2}")
    assert run("fit", *epochs, *WATCHING) == 0
    plain = read_record(folder)
    assert "trainer.callbacks" not in plain.settings
    assert "trainer.callbacks null, now" in untouched(*epochs, "--resume", *gathering).err
    assert run("fit", *epochs, "--overwrite", *gathering) == 0
    gathered = read_record(folder)
    assert gathered.fingerprint != plain.fingerprint
    assert gathered.settings["trainer.callbacks"][0]["class_path"] == GATHERING
    assert run("fit", *epochs, "--resume") == 0
    assert run("fit", *epochs, "--resume", "--trainer.callbacks=null") == 2
    assert "trainer.callbacks" in capsys.readouterr().err


@pytest.mark.fault("endoscopy A1")
@pytest.mark.usefixtures("trained")
def test_other_training_objects_are_refused(toy, untouched, monkeypatch):
    others = [f"other{number}" for number in range(52)]
    monkeypatch.setattr(toy.ToyData, "training_objects", lambda self: others)
    error = untouched("--resume", "--trainer.max_epochs", "1").err
    assert "52 training objects, but others" in error


@pytest.mark.fault("endoscopy A1")
@pytest.mark.usefixtures("trained")
def test_a_training_without_a_record_is_not_resumed(run, tmp_path, capsys):
    (tmp_path / "runs/toy/a/record.json").write_text("{")
    assert run("fit", "--resume", "--trainer.max_epochs", "1") == 2
    assert "it is not known what" in capsys.readouterr().err


@pytest.mark.fault("language 4")
@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("part", [0.0, 0.5, None])
def test_a_damaged_checkpoint_is_not_resumed(untouched, tmp_path, part):
    path = tmp_path / "runs/toy/a/checkpoints/last.ckpt"
    content = path.read_bytes()
    path.write_bytes(b"garbage" if part is None else content[: int(part * len(content))])
    error = untouched("--resume", "--trainer.max_epochs", "1").err
    assert "last.ckpt is damaged or not a checkpoint" in error
    assert "start again with --overwrite" in error
    assert error.count("\n") == 1


@pytest.mark.fault("language 4")
@pytest.mark.usefixtures("trained")
def test_a_checkpoint_of_something_else_is_not_resumed(run, tmp_path, capsys):
    path = tmp_path / "runs/toy/a/checkpoints/last.ckpt"
    whole = torch.load(path, weights_only=True)
    for content, said in (
        (whole["state_dict"], "is not a checkpoint of a training run: start again"),
        ({**whole, "state_dict": {"a": torch.ones(1)}}, "is a checkpoint of another network"),
    ):
        torch.save(content, path)
        assert run("fit", "--resume", "--trainer.max_epochs", "2") == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_a_training_that_was_killed_while_it_claimed_its_folder_starts(run, tmp_path):
    folder = tmp_path / "runs/toy/a"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "environment.json").write_text("{}")
    assert run("fit", "--resume", "--trainer.max_epochs", "1") == 0
    assert read_record(folder).settings["trainer.max_epochs"] == 1


def test_a_training_that_fails_before_its_first_checkpoint_gives_the_folder_back(
    refuses, run, toy, tmp_path, monkeypatch
):
    def fail(self):
        raise ValueError("Invalid learning rate: -1.0")

    with monkeypatch.context() as broken:
        broken.setattr(toy.ToyModule, "configure_optimizers", fail)
        refuses(ValueError, ("Invalid", lambda: run("fit", "--trainer.max_epochs", "1")))
    assert (contents(tmp_path), run("fit", "--trainer.max_epochs", "1")) == ({}, 0)


@pytest.fixture
def other(run, tmp_path, toy, monkeypatch):
    """Checkpoint of a training of one epoch on other objects."""
    with monkeypatch.context() as changed:
        changed.setattr(toy.ToyData, "training_objects", lambda self: ["secret"])
        assert run("fit", "--name", "other", "--trainer.max_epochs", "1") == 0
    return tmp_path / "runs/toy/other/checkpoints/last.ckpt"


@pytest.mark.fault("endoscopy A1")
@pytest.mark.parametrize("existing", [False, True])
def test_resuming_from_another_run_is_refused(request, other, untouched, existing):
    """The network would be stored as one that has seen the objects of this run only."""
    if existing:
        request.getfixturevalue("trained")
    words = ("--resume", "--trainer.max_epochs", "2", "--ckpt_path", str(other))
    assert "give one of them" in untouched(*words).err


@pytest.mark.fault("video H2")
@pytest.mark.usefixtures("trained")
def test_a_run_is_not_overwritten_by_a_training_from_its_own_checkpoint(run, tmp_path, capsys):
    before = contents(tmp_path)
    link = tmp_path / "link.ckpt"
    link.symlink_to("runs/toy/a/checkpoints/last.ckpt")
    for start in ("runs/toy/a/checkpoints/last.ckpt", str(link)):
        words = ("--trainer.max_epochs", "2", "--overwrite", "--ckpt_path", start)
        assert run("fit", *words) == 2
        assert "lies in the run that --overwrite deletes" in capsys.readouterr().err
    link.unlink()
    assert contents(tmp_path) == before
    copy = tmp_path / "copy.ckpt"
    copy.write_bytes((tmp_path / "runs/toy/a/checkpoints/last.ckpt").read_bytes())
    words = ("--trainer.max_epochs", "2", "--overwrite", "--ckpt_path", str(copy))
    assert run("fit", *words) == 0


@pytest.mark.fault("video H8")
def test_the_checkpoint_of_another_network_is_one_line(other, untouched):
    words = ("--trainer.max_epochs", "2", "--ckpt_path", str(other), "--model.dim", "4")
    error = untouched(*words).err
    assert "is a checkpoint of another network: size mismatch for net.0.weight" in error
    assert error.count("\n") == 1


@pytest.mark.fault("video H8")
@pytest.mark.usefixtures("trained")
def test_what_the_checkpoint_of_another_network_would_have_replaced_is_kept(other, untouched):
    words = ("--trainer.max_epochs", "2", "--ckpt_path", str(other), "--model.dim", "4")
    untouched(*words, "--overwrite")


@pytest.mark.fault("endoscopy A1")
def test_a_training_knows_what_its_start_was_trained_on(run, other, tmp_path, capsys):
    folder = tmp_path / "runs/toy/a"
    assert run("fit", "--trainer.max_epochs", "2", "--ckpt_path", str(other)) == 0
    kept = read_record(folder / "weights/fit-s0")
    assert kept.settings["start"] == sha256(other)[:16]
    assert {"secret", "sample0"} <= set(kept.objects)
    last = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert seen(last) == set(kept.objects)
    assert run("fit", "--resume", "--trainer.max_epochs", "2") == 0
    again = read_record(folder / "weights/fit-s0")
    assert (again.fingerprint, again.objects) == (kept.fingerprint, kept.objects)
    (folder / "checkpoints/last.ckpt").unlink()
    assert run("fit", "--resume", "--trainer.max_epochs", "2") == 2
    assert "give that --ckpt_path again, with --overwrite" in capsys.readouterr().err


def test_a_start_that_is_complete_leaves_nothing_to_train(other, untouched):
    error = untouched("--trainer.max_epochs", "1", "--ckpt_path", str(other)).err
    assert "nothing was trained" in error


@pytest.mark.fault("video H3")
@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("limit", ["max_epochs", "max_steps", "limit_train_batches"])
def test_a_training_without_a_step_is_refused_before_a_file_is_touched(untouched, limit):
    error = untouched("--overwrite", f"--trainer.{limit}", "0").err
    assert f"--trainer.{limit} 0 trains nothing" in error


@pytest.mark.fault("video H3")
def test_a_training_that_ends_without_a_step_says_so(untouched):
    assert "nothing was trained" in untouched("--trainer.max_time", "00:00:00:00").err


@pytest.mark.fault("video H3")
@pytest.mark.usefixtures("trained")
def test_a_trial_run_leaves_the_run_folder_as_it_is(untouched):
    printed = untouched("--overwrite", "--trainer.fast_dev_run", "true", code=0).out
    assert "nothing was kept" in printed


@pytest.mark.fault("video H9")
@pytest.mark.parametrize("value", ["true", "false", "-1"])
def test_a_seed_is_a_number(untouched, value):
    error = untouched("--trainer.max_epochs", "1", "--seed_everything", value).err
    assert f"--seed_everything {value} is no seed" in error


@pytest.mark.usefixtures("trained")
def test_what_decides_nothing_may_differ(run):
    more = ("--data.num_workers", "1", "--trainer.log_every_n_steps", "3")
    assert run("fit", "--resume", "--trainer.max_epochs", "1", *more) == 0


@pytest.mark.usefixtures("trained")
def test_a_longer_training_goes_on_and_says_so(run, tmp_path, capsys):
    folder = tmp_path / "runs/toy/a"
    short = read_record(folder)
    assert run("fit", "--resume", "--trainer.max_epochs", "2") == 0
    assert f"checkpoint is {folder.relative_to(tmp_path)}/checkpoints" in capsys.readouterr().out
    record = read_record(folder)
    assert record.settings["trainer.max_epochs"] == 2
    assert record.settings["lengthened"] is True
    assert record.fingerprint != short.fingerprint
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["epoch"] == 2
    assert read_record(folder / "weights/fit-s0").fingerprint == record.fingerprint
    assert run("fit", "--resume", "--trainer.max_epochs", "2") == 0
    assert read_record(folder).settings["lengthened"] is True


@pytest.mark.usefixtures("trained")
def test_trained_weights_enter_the_results_of_the_run(tmp_path):
    folder = tmp_path / "runs/toy/a"
    kept = Arrays().load(folder / "weights/fit-s0")
    last = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert kept.keys() == last.keys()
    assert all(torch.equal(kept[name], last[name]) for name in kept)
    record = json.loads((folder / "weights/fit-s0/record.json").read_text())
    assert record["objects"] == sorted(f"sample{number}" for number in range(52))
    assert record["command"].startswith("gates toy fit")


@pytest.mark.usefixtures("trained")
def test_an_application_may_train_by_several_verbs(run, tmp_path, capsys):
    folder = tmp_path / "runs/toy/a"
    before = contents(folder)
    assert run("distill", "--trainer.max_epochs", "1", "--model.width", "3") == 0
    assert before.items() <= contents(folder).items()
    assert (folder / "distill/checkpoints/last.ckpt").is_file()
    assert Arrays().load(folder / "weights/distill-s0")["net.0.weight"].shape == (3, 8)
    assert run("distill", "--resume", "--trainer.max_epochs", "1", "--model.width", "4") == 2
    assert "model.width 3, now 4" in capsys.readouterr().err
    assert run("distill", "--trainer.max_epochs", "1") == 2
    assert "--resume to continue" in capsys.readouterr().err


def test_each_training_verb_has_its_section(run, tmp_path):
    config = tmp_path / "both.yaml"
    config.write_text(
        "trainer: {max_epochs: 1}\nfit: {model: {lr: 0.1}}\ndistill: {model: {width: 2}}\n"
    )
    assert (run("fit", "--config", str(config)), run("distill", "--config", str(config))) == (0, 0)
    assert read_record(tmp_path / "runs/toy/a").settings["model.lr"] == 0.1
    distilled = read_record(tmp_path / "runs/toy/a/distill").settings
    assert (distilled["model.width"], distilled["model.lr"]) == (2, 0.05)
