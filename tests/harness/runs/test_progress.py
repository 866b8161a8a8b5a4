import sys

import pytest
from lightning.pytorch.callbacks import RichProgressBar

from harness.command import GatesRunTrainer
from harness.runs.callbacks import PlainProgress, progress_bar
from harness.runs.terminal import quiet_lightning


def test_the_bar_suits_the_output(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    assert isinstance(progress_bar(), PlainProgress)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert isinstance(progress_bar(), RichProgressBar)


@pytest.fixture
def train(toy, tmp_path, capsys):
    """Train two epochs of the toy with a bar and return what was printed."""

    class Module(toy.ToyModule):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", 1.23456, prog_bar=True)

    def run(bar):
        quiet_lightning()
        trainer = GatesRunTrainer(
            max_epochs=2,
            accelerator="cpu",
            logger=False,
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            callbacks=[bar],
        )
        trainer.fit(Module(), toy.ToyData())
        return capsys.readouterr().out.splitlines()

    return run


def test_plain_lines_tell_step_and_scores(train):
    lines = train(PlainProgress(seconds=1e9))
    assert lines == ["epoch 0  step 7  val/loss 1.235", "epoch 1  step 14  val/loss 1.235"]


def test_a_line_a_step_if_steps_are_slow(train):
    lines = train(PlainProgress(seconds=0.0))
    assert len(lines) == 2 * (7 + 1)


def test_a_disabled_bar_is_silent(train):
    bar = PlainProgress(seconds=0.0)
    bar.disable()
    assert train(bar) == []
