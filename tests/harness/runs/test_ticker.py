"""What plain lines and a terminal show of work under way."""

import sys
import threading
import time
from io import StringIO

import pytest
import rich
from rich.console import Console

from harness.runs import terminal as ticker
from harness.runs.terminal import counting, stepping, ticking, working


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


def said(capsys, start: str) -> str:
    """Wait for a plain line that begins so, while nothing else is done, and return it."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        for line in capsys.readouterr().out.splitlines():
            if line.startswith(start):
                return line
        time.sleep(0.01)
    raise AssertionError(f"no line begins with {start!r}")


def test_long_steps_are_not_silent(capsys):
    with working("drawing", seconds=0.02):
        assert said(capsys, "drawing  ") == "drawing  0 s"
    for place, name in enumerate(stepping("scoring", ["home", "mmoe"], seconds=0.02), 1):
        assert said(capsys, f"scoring: {name}") == f"scoring: {name}  {place} of 2  0 s"
    with counting("scoring rows", seconds=0.02) as count:
        count(7, None)
        assert said(capsys, "scoring rows  7") == "scoring rows  7  0 s"


def test_plain_lines_say_what_is_counted_and_how_long_the_rest_takes(capsys):
    with ticking("training networks", 4, unit="epochs", seconds=0.02) as tick:
        assert said(capsys, "training networks") == "training networks  0 of 4 epochs  0 s"
        tick()
        assert said(capsys, "training networks  1 of 4 epochs  0 s, about ").endswith(" left")
    assert ticker._place(1, 4, "epochs", 10.0) == "  1 of 4 epochs  10 s, about 30 s left"
    assert ticker._place(2, 8, "", 60.0) == "  2 of 8  60 s, about 3 min left"
    assert ticker._place(1, 101, "", 100.0) == "  1 of 101  100 s, about 3 h left"
    assert ticker._place(4, 4, "", 60.0) == "  4 of 4  60 s"


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


def test_a_terminal_says_what_is_counted(terminal):
    with ticking("training networks", 2, unit="epochs") as tick:
        tick()
        tick()
    assert "2 of 2 epochs" in terminal.getvalue()
