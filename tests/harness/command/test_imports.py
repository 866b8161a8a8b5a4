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

run_verb("toy", {"go": FunctionVerb("__main__:go", "paths")}, sys.argv[1:], config="tiny")
print({"lightning", "torchmetrics"} & set(sys.modules))
"""


def test_a_function_runs_without_lightning():
    command = [sys.executable, "-c", PROGRAM, "go", "a", "b", "--often", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["runs/toy/tiny ['a', 'b'] 3", "set()"]
