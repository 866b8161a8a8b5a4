"""Verbs that are functions do not wait for Lightning."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
PROGRAM = """
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
        words: Filled in by the command line.
    \"\"\"
    print(words or [])

verbs = {
    "say": FunctionVerb("__main__:say", "words"),
    "go": FunctionVerb("__main__:go", "paths"),
    "turn": FunctionVerb("__main__:turn", ("left", "right")),
}
run_verb("toy", verbs, sys.argv[1:], config="tiny")
print({"lightning", "torchmetrics"} & set(sys.modules))
"""


def run(*words):
    command = [sys.executable, "-c", PROGRAM, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_function_runs_without_lightning():
    done = run("go", "a", "b", "--often", "3")
    assert done.stdout.splitlines() == ["runs/toy/tiny ['a', 'b'] 3", "set()"]


def test_a_verb_takes_paths_by_name_and_needs_no_run():
    assert run("turn", "a", "--often=2", "b").stdout.splitlines() == ["a b 2", "set()"]
    text = run("turn", "--help").stdout
    assert text.startswith("usage: gates toy turn LEFT RIGHT [--config FILE]")
    assert "--root" not in text
    assert "--root" in run("go", "--help").stdout


def test_words_may_be_left_out():
    assert run("say").stdout.splitlines()[0] == "[]"
    assert run("say", "a", "b").stdout.splitlines()[0] == "['a', 'b']"
    text = run("say", "--help").stdout
    assert text.startswith("usage: gates toy say [WORDS ...] [--config FILE]")
    assert "required" not in text


def test_a_path_that_is_missing_is_named():
    done = run("turn", "a")
    assert done.returncode == 2
    assert done.stderr == "gates toy turn: error: nothing is given for RIGHT\n"
    done = run("turn", "a", "b", "--root", "c")
    assert "unrecognized arguments: --root" in done.stderr
