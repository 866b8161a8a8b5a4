"""A training claims its run folder when its data are ready, not before, and it alone."""

import os
import pickle
import shutil
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

import pytest
import torch

from apps.main import App, main
from core_gates.errors import GatesError
from harness.experiment import Arrays

QUICK = ["--trainer.max_steps", "2", "--trainer.enable_model_summary", "false"]
QUICK += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
TABLE = {"toy": App("toy", "a toy", {"fit": "train", "score": "score"})}


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def fail(*_, **__):
    raise GatesError("these data are broken")


@pytest.mark.fault("endoscopy D17")
@pytest.mark.parametrize("hook", ["prepare_data", "setup"])
def test_a_fit_that_fails_on_its_data_claims_nothing(toy, tmp_path, monkeypatch, capsys, hook):
    with monkeypatch.context() as broken:
        broken.setattr(toy.ToyData, hook, fail)
        assert main(["toy", "fit", *QUICK, "--name", "a"], TABLE) == 2
    assert "these data are broken" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert main(["toy", "fit", *QUICK, "--name", "a"], TABLE) == 0
    assert (tmp_path / "runs/toy/a/config.yaml").is_file()


@pytest.mark.fault("endoscopy D17")
def test_an_overwriting_fit_that_fails_on_its_data_deletes_nothing(toy, tmp_path, monkeypatch):
    main(["toy", "fit", *QUICK, "--name", "a"], TABLE)
    files = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    monkeypatch.setattr(toy.ToyData, "setup", fail)
    assert main(["toy", "fit", *QUICK, "--name", "a", "--overwrite"], TABLE) == 2
    assert files == {
        path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()
    }


def test_the_folder_is_claimed_before_the_first_step(toy, tmp_path, monkeypatch):
    def look(self):
        found.update(path.name for path in (tmp_path / "runs/toy/a").iterdir())

    found: set[str] = set()
    monkeypatch.setattr(toy.ToyModule, "on_train_start", look)
    assert main(["toy", "fit", *QUICK, "--name", "a"], TABLE) == 0
    assert {"config.yaml", "environment.json", "checkpoints"} <= found


def test_no_logger_is_a_choice(toy, tmp_path):
    assert main(["toy", "fit", *QUICK, "--name", "a", "--trainer.logger", "false"], TABLE) == 0
    assert not (tmp_path / "runs/toy/a/metrics.csv").exists()
    assert not (tmp_path / "runs/toy/a/tensorboard").exists()


@pytest.mark.fault("endoscopy D19")
@pytest.mark.parametrize("broken", [True, False])
def test_a_warning_never_precedes_a_one_line_error(toy, monkeypatch, broken):
    def setup(self, stage):
        warnings.warn("data look odd", stacklevel=1)
        if broken:
            raise GatesError("these data are broken")

    monkeypatch.setattr(toy.ToyData, "setup", setup)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        code = main(["toy", "fit", *QUICK, "--name", "a"], TABLE)
    shown = [str(one.message) for one in seen]
    assert code == (2 if broken else 0)
    assert shown == [] if broken else "data look odd" in shown


forking = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
BUSY = "another process is at work on runs/toy/same: wait for it, or give --name NEW\n"


def begin(log, *words):
    """Fork a process that runs ``gates toy fit`` with these words, and return its id."""
    if child := os.fork():
        return child
    code = 1
    try:
        for name in ("stdout", "stderr"):
            setattr(sys, name, Path(f"{log}.{name}").open("w", buffering=1))  # noqa: SIM115
        code = main(["toy", "fit", *QUICK, "--name", "same", *words], TABLE)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def awaited(child=-1):
    """Wait for a process, or for the first of all, and return its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def wait_for(path, seconds=20.0):
    end = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.01)


def assert_one_model(alone, folder):
    """Compare a run folder, and all that lies next to it, with that of an undisturbed training."""
    found = [
        {str(path.relative_to(run.parent)) for path in run.parent.rglob("*") if path.suffix}
        for run in (alone, folder)
    ]
    names = [{name for name in part if "tfevents" not in name} for part in found]
    assert names[0] == names[1]
    first, second = (Arrays().load(run / "weights/fit-s0") for run in (alone, folder))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def alone(toy, tmp_path):
    """The run folder of a training that nothing disturbs."""
    assert main(["toy", "fit", *QUICK, "--name", "same"], TABLE) == 0
    Path("runs").rename("alone")
    return tmp_path / "alone/toy/same"


@pytest.fixture
def waiting(toy, tmp_path, monkeypatch):
    """``waiting(steps)``: a training then writes the file ``there`` and waits for ``go``."""

    def wait_after(steps):
        def wait(module, *_):
            if module.global_step == steps:
                (tmp_path / "there").touch()
                wait_for(tmp_path / "go")

        monkeypatch.setattr(toy.ToyModule, "on_train_batch_start", wait)

    return wait_after


@forking
@pytest.mark.fault("house 0c")
@pytest.mark.parametrize("words", [(), ("--overwrite",), ("--resume",)], ids=" ".join)
def test_of_two_trainings_begun_together_one_is_refused(alone, waiting, tmp_path, words):
    folder = tmp_path / "runs/toy/same"
    if words:
        shutil.copytree(alone, folder)
    if "--resume" in words:  # of a training that was killed before its first checkpoint
        (folder / "checkpoints/last.ckpt").unlink()
        shutil.rmtree(folder / "weights")
    waiting(0)
    begin("a", *words)
    begin("b", *words)
    assert awaited() == 2
    Path("go").touch()
    assert awaited() == 0
    said = sorted(Path(name).read_text() for name in ("a.stderr", "b.stderr"))
    assert said == ["", f"gates toy fit: error: {BUSY}"]
    assert_one_model(alone, folder)


@forking
@pytest.mark.parametrize("steps", [0, 1])  # before and after the first checkpoint
def test_a_training_that_is_killed_is_resumed_at_once(alone, waiting, tmp_path, capsys, steps):
    """The process that loads its data lives on for some seconds."""
    waiting(steps)
    child = begin("a", "--data.num_workers", "1", "--checkpoint.every_n_steps", "1")
    wait_for(tmp_path / "there")
    os.kill(child, signal.SIGKILL)
    assert awaited(child) == -signal.SIGKILL
    Path("go").touch()
    assert main(["toy", "fit", *QUICK, "--name", "same", "--resume"], TABLE) == 0
    assert ("has no checkpoint: training starts" in capsys.readouterr().out) == (steps == 0)
    assert_one_model(alone, tmp_path / "runs/toy/same")


def test_a_training_whose_folder_is_held_can_be_spawned(toy, monkeypatch):
    monkeypatch.setattr(toy.ToyCLI, "before_fit", lambda cli: pickle.dumps(cli.trainer), False)
    assert main(["toy", "fit", *QUICK, "--name", "a"], TABLE) == 0


def test_a_place_that_cannot_be_written_is_one_line(toy, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["toy", "fit", *QUICK, "--name", "a", "--root", "file"], TABLE) == 2
    assert capsys.readouterr().err == (
        "gates toy fit: error: file/toy/a cannot be written: Not a directory\n"
    )
