"""The command ``gates`` where packages of other projects have the names of ours."""

import subprocess
import sys
from importlib.metadata import entry_points

import pytest

RUN = "import sys; from core_gates.entry import gates; sys.exit(gates())"


@pytest.mark.fault("46 H3")
@pytest.mark.parametrize("content", ["", "def main(): print('foreign')"])
@pytest.mark.parametrize("package", ["apps", "harness"])
def test_a_foreign_package_is_named_in_one_line(tmp_path, package, content):
    (tmp_path / package).mkdir()
    for file in ("__init__.py", "main.py"):
        (tmp_path / package / file).write_text(content)
    code = f"import core_gates.entry, sys; sys.path.insert(0, {str(tmp_path)!r}); {RUN}"
    run = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.count("\n") == 1
    assert run.stderr.startswith(f"gates: error: {tmp_path / package} comes before ")
    assert "rename it, or take its folder out of PYTHONPATH" in run.stderr


def test_the_script_starts_there_and_hands_over():
    (script,) = entry_points(group="console_scripts", name="gates")
    assert script.value == "core_gates.entry:gates"
    run = subprocess.run([sys.executable, "-c", RUN, "--help"], capture_output=True, text=True)
    assert (run.returncode, run.stdout[:10]) == (0, "usage: gat")
