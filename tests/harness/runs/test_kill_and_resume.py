import runpy
import time
from pathlib import Path

import pytest

COMMON = ["--trainer.log_every_n_steps", "1", "--trainer.enable_model_summary", "false"]
CHECKPOINT = ["--checkpoint.every_n_steps", "5", "--checkpoint.monitor", "val/loss"]
TOY = str(Path(__file__).parents[1] / "toy.py")
KILLED = pytest.mark.costly("three or four processes, some of them killed")
MADE = ("*/*/record.json", "*/*/result.*", "scores.json", "scores.md")


@KILLED
def test_killed_runs_end_like_unbroken_ones(kill_and_resume):
    epochs = ["--trainer.max_epochs", "6"]
    folder = kill_and_resume([TOY, "fit", *COMMON, *CHECKPOINT, *epochs], app="toy", kills=1)
    assert (folder / "checkpoints" / "best.ckpt").is_file()


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_resume_too(kill_and_resume):
    ranks = ["--trainer.accelerator", "cpu", "--trainer.strategy", "ddp", "--trainer.devices", "2"]
    command = [TOY, "fit", *COMMON, *CHECKPOINT, *ranks, "--trainer.max_epochs", "20"]
    kill_and_resume(command, app="toy", seed=3, kills=1)


@KILLED
def test_killed_evaluations_end_like_unbroken_ones(kill_and_resume):
    """Killed inside a training and between pieces; of the pieces only the broken one is redone."""
    folder = kill_and_resume([TOY, "evaluate", "--epochs", "2"], app="toy", compare=MADE)
    assert len(list(folder.glob("[tcw]*/[nw]*/record.json"))) == 10


@pytest.mark.slow  # of the harness of tests alone
def test_work_that_ignores_its_seed_is_noticed(kill_and_resume):
    command = [TOY, "evaluate", "--sloppy", "--trials", "1", "--epochs", "1"]
    with pytest.raises(AssertionError, match="differ from the uninterrupted run: "):
        kill_and_resume(command, app="toy", compare=MADE[:2])


def test_a_second_evaluation_at_the_same_piece_ends_with_one_line(
    forked, tmp_path, monkeypatch, capsys
):
    command = [TOY, "evaluate", "--epochs", "100", "--root", str(tmp_path)]
    first = forked.Forked(command)
    try:
        while not list(tmp_path.glob("toy/default/trials/.*.lock")):
            assert first.poll() is None
            time.sleep(0.05)
        monkeypatch.syspath_prepend(Path(TOY).parent)
        monkeypatch.setattr("sys.argv", command)
        with pytest.raises(SystemExit) as second:
            runpy.run_path(TOY, run_name="__main__")
        assert first.poll() is None, "the first had finished"
    finally:
        first.kill()
    assert second.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "another process is at work on" in said
    assert said.startswith("gates toy evaluate: error: ")
