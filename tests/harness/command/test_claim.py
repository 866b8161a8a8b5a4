"""A training claims its run folder when its data are ready, not before."""

import warnings

import pytest

from apps.main import App, main
from core_gates.errors import GatesError

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
