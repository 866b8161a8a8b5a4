import json

import pytest

from core_gates.errors import GatesError
from harness.runs import folder as folder_module
from harness.runs.folder import RunFolder


def test_an_existing_run_is_refused_resumed_or_overwritten(tmp_path):
    folder = RunFolder("toy", "a", tmp_path).open()
    folder.metrics.write_text("step\n")
    with pytest.raises(GatesError, match="add --resume to continue, --overwrite to start again"):
        RunFolder("toy", "a", tmp_path).open()
    assert RunFolder("toy", "a", tmp_path, resume=True).open().metrics.is_file()
    assert not RunFolder("toy", "a", tmp_path, overwrite=True).open().metrics.exists()


def test_prepared_files_neither_bar_a_training_nor_are_deleted(tmp_path):
    prepared = tmp_path / "toy" / "a" / "nature.zarr" / "zarr.json"
    prepared.parent.mkdir(parents=True)
    prepared.touch()
    folder = RunFolder("toy", "a", tmp_path).open()
    folder.scores.touch()
    RunFolder("toy", "a", tmp_path, overwrite=True).open()
    assert prepared.exists()
    assert not folder.scores.exists()


def test_what_is_overwritten_is_back_unless_the_new_run_gets_a_checkpoint(tmp_path):
    def start(name):
        folder = RunFolder("toy", "a", tmp_path, overwrite=True).open()
        folder.metrics.write_text(name)
        return folder

    old = start("old")
    (old.checkpoints / "last.ckpt").write_text("old")
    old.scores.write_text("old")
    start("killed before its first checkpoint")
    start("failed").give_back()
    assert {old.metrics.read_text(), old.scores.read_text(), old.last_checkpoint.read_text()} == {
        "old"
    }
    assert not (old.path / ".replaced").exists()
    new = start("new")
    (new.checkpoints / "last.ckpt").write_text("new")
    new.give_back()
    assert new.metrics.read_text() == "new"
    assert not new.scores.exists()
    new.forget_replaced()
    assert sorted(path.name for path in new.path.iterdir()) == [
        "checkpoints", "environment.json", "metrics.csv",
    ]  # fmt: skip


@pytest.mark.fault("video V5")
def test_a_complete_run_outlives_an_incomplete_one_and_a_kill_between_two_moves(
    tmp_path, monkeypatch
):
    def start(name):
        folder = RunFolder("toy", "a", tmp_path, overwrite=True).open()
        folder.metrics.write_text(name)
        return folder

    complete = start("complete")
    complete.config.write_text("complete")
    (complete.checkpoints / "last.ckpt").write_text("complete")
    (start("stopped").checkpoints / "last.ckpt").write_text("stopped")
    start("failed").give_back()
    assert complete.metrics.read_text() == complete.last_checkpoint.read_text() == "complete"
    with monkeypatch.context() as killed:
        moves = iter(range(2))
        move = folder_module._move
        killed.setattr(folder_module, "_move", lambda *paths: (next(moves), move(*paths)))
        with pytest.raises(StopIteration):
            start("killed")
    start("failed").give_back()
    assert complete.config.read_text() == complete.last_checkpoint.read_text() == "complete"
    assert not [path for path in complete.path.iterdir() if path.name.startswith(".")]


@pytest.mark.fault("house 0c")
def test_what_another_has_claimed_is_not_given_back(refuses, tmp_path):
    folder = RunFolder("toy", "a", tmp_path).open()
    other = RunFolder("toy", "a", tmp_path)
    refuses(GatesError, ("exists", lambda: other.open()))
    other.give_back()
    assert folder.environment.is_file()
    with folder.alone(), pytest.raises(GatesError, match="another process is at work on"):
        other.alone().__enter__()
    assert [path.name for path in (tmp_path / "toy").iterdir()] == ["a"]


def test_nothing_is_touched_before_it_is_opened(tmp_path):
    folder = RunFolder("toy", "a", tmp_path)
    assert not folder.exists()
    assert folder.last_checkpoint is None
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_are_found_once_they_exist(tmp_path):
    folder = RunFolder("toy", "a", tmp_path).open()
    assert folder.last_checkpoint is None
    (folder.checkpoints / "last.ckpt").touch()
    assert folder.last_checkpoint == folder.checkpoints / "last.ckpt"
    assert folder.best_checkpoint is None


def test_the_environment_is_recorded(tmp_path):
    content = json.loads(RunFolder("toy", "a", tmp_path).open().environment.read_text())
    assert content["packages"]["lightning"].startswith("2.")
    assert content["device"]
    assert content["cpus"] >= 1


@pytest.mark.parametrize("name", ["", "a/b", "..", ".", "/abs"])
def test_a_name_is_one_component(refuses, tmp_path, name):
    refuses(GatesError, ("plain name", lambda: RunFolder("toy", name, tmp_path)))


def test_resume_and_overwrite_exclude_each_other(tmp_path):
    with pytest.raises(GatesError, match="exclude each other"):
        RunFolder("toy", "a", tmp_path, resume=True, overwrite=True)
