"""The oldest transformers that is supported, in its own environment."""

import os
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

from language.hf.locate import OLDEST

ROOT = Path(__file__).parents[2]


def succeeded(*words, **environment):
    command = [sys.executable, "-m", *map(str, words)]
    options = {"cwd": ROOT, "env": os.environ | environment, "capture_output": True, "text": True}
    done = subprocess.run(command, check=False, **options)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.mark.fault("46 A1")
def test_the_floor_of_the_extra_is_the_version_that_models_are_refused_below():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert f"transformers>={OLDEST}" in extras["language"]


@pytest.mark.slow
@pytest.mark.skipif(version("transformers").startswith(f"{OLDEST}."), reason="it is installed")
def test_the_language_tests_pass_on_the_oldest_transformers(tmp_path):
    """With the releases of its dependencies that it asks for; PyTorch is that of the tests."""
    succeeded("pip", "install", "--quiet", "--target", tmp_path, f"transformers=={OLDEST}.*")
    path = {"PYTHONPATH": str(tmp_path)}
    assert f"Version: {OLDEST}." in succeeded("pip", "show", "transformers", **path)
    succeeded("pytest", "-q", "-x", "tests/language", "tests/apps/language", **path)
