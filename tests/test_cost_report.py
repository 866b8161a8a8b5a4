"""What tests cost is reported at the end of a run and fails none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

COST = Path(__file__).parent / "fixtures" / "cost.py"
CONFTEST = f"""
import runpy
found = runpy.run_path({str(COST)!r})
call = found["CostOfTests"].pytest_runtest_call
call.__globals__.update(LIMIT=0.1, WORTH=0.1)
def pytest_configure(config):
    config.pluginmanager.register(found["CostOfTests"]())
"""
TESTS = """
import subprocess, sys, time
import pytest
BURN = "import time\\nwhile time.process_time() < {}: pass"
def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
@pytest.fixture
def made():
    burn(0.15)
def test_light(): pass
def test_heavy(): burn(0.2)
def test_child(): subprocess.run([sys.executable, "-c", BURN.format(0.3)], check=True)
def test_fixture(made): pass
@getattr(pytest.mark, "costly")("a reason")
def test_marked(): burn(0.25)
def test_wrong():
    burn(0.15)
    assert False, "for another reason"
"""


@pytest.mark.fault("46 T1")
@pytest.mark.parametrize("workers", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_costly_tests_are_listed_and_pass(tmp_path, workers):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_some.py").write_text(TESTS)
    options = ["-p", "xdist", "-p", "no:cacheprovider", f"-n{workers}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, tmp_path],
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},  # they take seconds
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 failed, 5 passed" in done.stdout
    assert "for another reason" in done.stdout
    listed = done.stdout.partition("CPU-seconds of the slowest tests")[2].splitlines()
    rows = {
        name: (float(seconds), " ".join(kind))
        for seconds, *kind, place in (line.split() for line in listed if "::" in line)
        if (name := place.partition("::test_")[2]) and seconds[0].isdigit()
    }
    assert {name: kind for name, (_, kind) in rows.items()} == {
        **dict.fromkeys(("heavy", "child", "fixture", "wrong"), "no mark"),
        "marked": "costly",
    }
    least = {"heavy": 0.2, "child": 0.3, "fixture": 0.15, "wrong": 0.15, "marked": 0.25}
    assert all(rows[name][0] >= seconds - 0.05 for name, seconds in least.items())
    assert [*rows] == sorted(rows, key=lambda name: -rows[name][0])
