import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

MULTIPLIER = Path(__file__).with_name("multiplier.py")


@pytest.fixture(scope="session")
def toy():
    """The names of ``multiplier.py``."""
    return SimpleNamespace(**runpy.run_path(str(MULTIPLIER)))


@pytest.fixture
def toy_command():
    """``toy_command(folder, **limits)``: the service as a process."""
    return lambda folder, *words: [sys.executable, str(MULTIPLIER), str(folder), *map(str, words)]
