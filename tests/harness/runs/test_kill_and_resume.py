import pytest

COMMON = ["--trainer.log_every_n_steps", "1", "--trainer.enable_model_summary", "false"]
CHECKPOINT = ["--checkpoint.every_n_steps", "5", "--checkpoint.monitor", "val/loss"]


def test_killed_runs_end_like_unbroken_ones(toy_command, kill_and_resume):
    epochs = ["--trainer.max_epochs", "40"]
    folder = kill_and_resume([*toy_command, "fit", *COMMON, *CHECKPOINT, *epochs], app="toy")
    assert (folder / "checkpoints" / "best.ckpt").is_file()


@pytest.mark.distributed
def test_two_ranks_resume_too(toy_command, kill_and_resume):
    ranks = ["--trainer.accelerator", "cpu", "--trainer.strategy", "ddp", "--trainer.devices", "2"]
    command = [*toy_command, "fit", *COMMON, *CHECKPOINT, *ranks, "--trainer.max_epochs", "60"]
    kill_and_resume(command, app="toy", seed=3, kills=1)
