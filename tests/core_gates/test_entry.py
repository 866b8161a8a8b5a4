"""The command ``gates`` and imports where packages of other projects have the names of ours."""

import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

DOMAINS = (
    *("diffusion", "endoscopy", "language", "recsys", "studies", "video_multitask", "weather"),
)
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
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)
    assert run.stderr.startswith(f"gates: error: {tmp_path / package} comes before ")
    assert "rename it, or take its folder out of PYTHONPATH" in run.stderr


def test_the_script_starts_there_and_hands_over():
    (script,) = entry_points(group="console_scripts", name="gates")
    assert script.value == "core_gates.entry:gates"
    run = subprocess.run([sys.executable, "-c", RUN, "--help"], capture_output=True, text=True)
    assert (run.returncode, run.stdout[:10]) == (0, "usage: gat")


def imported(tmp_path, code):
    """Return what an import writes at the start of ``/``, with a folder before all others."""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment)
    return run.returncode, run.stderr


@pytest.mark.fault("46 H3")
@pytest.mark.parametrize(
    ("foreign", "code"),
    [
        ("harness/__init__.py", "import recsys.figures"),
        ("harness.py", "from weather import LETKF"),
        ("harness/__init__.py", "import harness; from diffusion import GatedFusion"),
        ("harness.py", "import harness, recsys.figures"),
        ("harness.py", "import recsys, harness; from weather import LETKF"),
        ("recsys/__init__.py", "import video_multitask.leaks"),
    ],
)
@pytest.mark.ends("an interpreter a case")
def test_a_domain_names_the_foreign_package_that_it_would_import(tmp_path, foreign, code):
    path = tmp_path / foreign
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    code, told = imported(tmp_path, code)
    last = told.splitlines()[-1]
    assert code == 1
    shadow = path if foreign == "harness.py" else tmp_path / foreign.partition("/")[0]
    assert last.startswith(f"core_gates.errors.GatesError: {shadow} comes before ")
    assert "rename it, or take its folder out of PYTHONPATH" in last


@pytest.mark.fault("46 neighbors")
@pytest.mark.parametrize("foreign", ["core_gates/__init__.py", "core_gates.py"])
@pytest.mark.parametrize("package", DOMAINS)
def test_a_domain_names_a_foreign_core(tmp_path, foreign, package):
    path = tmp_path / foreign
    path.parent.mkdir(exist_ok=True)
    path.write_text("")
    code, told = imported(tmp_path, f"import {package}")
    assert (code, told.splitlines()[-1].endswith(f"from 'core_gates' ({path})")) == (1, True)


@pytest.mark.fault("46 H3")
def test_a_foreign_package_that_is_not_needed_disturbs_nobody(tmp_path):
    for package in ("harness", "apps", "weather"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("mine = 1")
    code = "import language, harness, apps, weather; from language import attach_output_gate"
    assert imported(tmp_path, f"{code}; assert harness.mine") == (0, "")
