"""What a training run shows of its progress."""

import itertools
import re
import sys
from functools import partial
from types import SimpleNamespace

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.demos.boring_classes import BoringModel

from harness.runs import callbacks
from harness.runs.callbacks import PlainProgress, progress_bar
from harness.runs.terminal import quiet_lightning


def test_the_bar_suits_the_output(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    assert isinstance(progress_bar(), PlainProgress)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert isinstance(progress_bar(), RichProgressBar)


@pytest.mark.fault("46 WEATHER")
def test_a_training_tells_its_steps_and_the_time_that_is_left(monkeypatch, capsys, tmp_path):
    quiet_lightning()
    clock = SimpleNamespace(monotonic=partial(next, itertools.count(0.0, 10.0)))
    monkeypatch.setattr(callbacks, "time", clock)
    options = {
        "limit_train_batches": 3,
        "limit_val_batches": 0,
        "accelerator": "cpu",
        "logger": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    bar = PlainProgress(0.0)
    Trainer(max_epochs=2, callbacks=[bar], default_root_dir=tmp_path, **options).fit(BoringModel())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert [line.split("  ")[:2] for line in lines[::5]] == [
        ["epoch 0", "step 1 of 6"],
        ["epoch 1", "step 6 of 6"],
    ]
    took, left = re.fullmatch(r".*  (\d+) s, about (\d+) s left", lines[1]).groups()
    assert int(left) == 2 * int(took)  # two steps of six
    assert "left" not in lines[-1]
