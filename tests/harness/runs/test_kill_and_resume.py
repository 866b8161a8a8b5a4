import os
import subprocess
import time

import pytest

COMMON = ["--trainer.log_every_n_steps", "1", "--trainer.enable_model_summary", "false"]
CHECKPOINT = ["--checkpoint.every_n_steps", "5", "--checkpoint.monitor", "val/loss"]
MADE = ("*/*/record.json", "*/*/result.*", "scores.json", "scores.md")


def test_killed_runs_end_like_unbroken_ones(toy_command, kill_and_resume):
    epochs = ["--trainer.max_epochs", "40"]
    folder = kill_and_resume([*toy_command, "fit", *COMMON, *CHECKPOINT, *epochs], app="toy")
    assert (folder / "checkpoints" / "best.ckpt").is_file()


@pytest.mark.distributed
def test_two_ranks_resume_too(toy_command, kill_and_resume):
    ranks = ["--trainer.accelerator", "cpu", "--trainer.strategy", "ddp", "--trainer.devices", "2"]
    command = [*toy_command, "fit", *COMMON, *CHECKPOINT, *ranks, "--trainer.max_epochs", "60"]
    kill_and_resume(command, app="toy", seed=3, kills=1)


def test_killed_evaluations_end_like_unbroken_ones(toy_command, kill_and_resume):
    """Killed inside a training and between pieces; of the pieces only the broken one is redone."""
    folder = kill_and_resume([*toy_command, "evaluate"], app="toy", compare=MADE)
    assert len(list(folder.glob("[tcw]*/[nw]*/record.json"))) == 10


def test_work_that_ignores_its_seed_is_noticed(toy_command, kill_and_resume):
    command = [*toy_command, "evaluate", "--sloppy", "--trials", "1", "--epochs", "2"]
    with pytest.raises(AssertionError, match="differ from the uninterrupted run: "):
        kill_and_resume(command, app="toy", compare=MADE[:2])


def test_a_second_evaluation_at_the_same_piece_ends_with_one_line(toy_command, tmp_path):
    command = [*toy_command, "evaluate", "--epochs", "100", "--root", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as first:
        while not list(tmp_path.glob("toy/default/trials/.*.lock")):
            assert first.poll() is None
            time.sleep(0.05)
        second = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        )
        assert first.poll() is None, "the first had finished"
        first.kill()
    assert second.returncode == 2
    assert second.stderr.count("\n") == 1
    assert "another process is at work on" in second.stderr
    assert second.stderr.startswith("gates toy evaluate: error: ")
