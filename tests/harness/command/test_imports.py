"""Verbs that are functions do not wait for Lightning."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[3]
PROGRAM = """
import json
import sys
from harness.command.verbs import FunctionVerb, Place, run_verb

def go(place: Place, paths: list[str], often: int = 1) -> None:
    \"\"\"Go to PATHS.

    Args:
        place: Filled in by the command line.
        paths: Filled in by the command line.
        often: How many times.
    \"\"\"
    print(place.run_folder.path, paths, often)

def turn(left: str, right: str, often: int = 1) -> None:
    \"\"\"Turn from LEFT to RIGHT.

    Args:
        left: Filled in by the command line.
        right: Filled in by the command line.
        often: How many times.
    \"\"\"
    print(left, right, often)

def say(words: list[str] | None = None) -> None:
    \"\"\"Say WORDS.

    Args:
        words: What is said, in as many
            words as are wanted.
    \"\"\"
    print(words or [])

verbs = {
    "say": FunctionVerb("__main__:say", "words"),
    "go": FunctionVerb("__main__:go", "paths"),
    "turn": FunctionVerb("__main__:turn", ("left", "right")),
}
for words in json.loads(sys.argv[1]):
    run_verb("toy", verbs, words, config="tiny")
print({"lightning", "torchmetrics"} & set(sys.modules))
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a verb in this process, which has Lightning; returns output, error and exit code."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)

    def done(*words):
        monkeypatch.setattr("sys.argv", ["gates", json.dumps([words])])
        code = 0
        try:
            runpy.run_path(str(program), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        return SimpleNamespace(**capsys.readouterr()._asdict(), code=code)

    return done


def test_functions_run_without_lightning():
    words = [["go", "a", "b", "--often", "3"], ["turn", "a", "--often=2", "b"]]
    command = [sys.executable, "-c", PROGRAM, json.dumps(words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["runs/toy/tiny ['a', 'b'] 3", "a b 2", "set()"]


def test_a_verb_takes_paths_by_name_and_needs_no_run(run):
    text = run("turn", "--help").out
    assert text.startswith("usage: gates toy turn LEFT RIGHT [--config FILE]")
    assert "--root" not in text
    assert "--root" in run("go", "--help").out


def test_words_may_be_left_out(run):
    assert run("say").out.splitlines()[0] == "[]"
    assert run("say", "a", "b").out.splitlines()[0] == "['a', 'b']"
    text = run("say", "--help").out
    assert text.startswith("usage: gates toy say [WORDS ...] [--config FILE]")
    assert "required" not in text
    assert "WORDS What is said, in as many words as are wanted." in " ".join(text.split())


def test_a_path_that_is_missing_is_named(run):
    done = run("turn", "a")
    line = "gates toy turn: error: nothing is given for RIGHT: see gates toy turn --help\n"
    assert (done.code, done.err) == (2, line)
    done = run("turn", "a", "b", "--root", "c")
    assert "unrecognized arguments: --root" in done.err
