import sys

from lightning.pytorch.callbacks import RichProgressBar

from harness.runs.callbacks import PlainProgress, progress_bar


def test_the_bar_suits_the_output(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    assert isinstance(progress_bar(), PlainProgress)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert isinstance(progress_bar(), RichProgressBar)
