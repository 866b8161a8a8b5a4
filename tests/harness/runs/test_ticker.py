"""What plain lines and a terminal show of work under way."""

import sys
import threading
import time
from io import StringIO

import pytest
import rich
from rich.console import Console

from harness.runs import terminal as ticker
from harness.runs.terminal import stepping, working


@pytest.fixture
def terminal(monkeypatch):
    """What is shown on a terminal."""
    shown = StringIO()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(rich, "_console", Console(file=shown, force_terminal=True, width=100))
    return shown


def test_plain_lines_name_the_step_and_pass_over_short_work(capsys, monkeypatch):
    assert list(stepping("scoring", ["home", "mmoe"])) == ["home", "mmoe"]
    with working("drawing"):
        pass
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(ticker, "SHORT", 0.0)
    for _ in stepping("scoring", ["home", "mmoe"]):
        pass
    assert capsys.readouterr().out.splitlines()[-1].startswith("scoring  0.")


def test_nothing_speaks_after_the_work_has_failed(capsys):
    before = threading.active_count()
    with pytest.raises(RuntimeError), working("drawing", seconds=0.01):
        raise RuntimeError
    assert threading.active_count() == before
    capsys.readouterr()
    time.sleep(0.05)
    assert capsys.readouterr().out == ""


def test_a_terminal_shows_steps_at_once_and_the_end_is_whole(terminal):
    for _ in stepping("scoring", ["home", "mmoe"]):
        pass
    with working("drawing"):
        pass
    shown = terminal.getvalue()
    assert "2/2" in shown
    assert "drawing" in shown
