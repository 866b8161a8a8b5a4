"""Fake data sets in official layouts, and tables made by hand."""

import os
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[2]


def load(name):
    spec = spec_from_file_location(f"make_{name}", TESTS / "data" / name / "make.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def real_colon():
    """The maker of fake REAL-Colon data."""
    return load("real_colon")


@pytest.fixture(scope="session")
def sun():
    """The maker of fake SUN data."""
    return load("sun")


@pytest.fixture(scope="session")
def golden():
    """The folder of golden vectors."""
    return TESTS / "golden" / "endoscopy"


@pytest.fixture(scope="session")
def shared():
    """The shared data of endoscopy; skips where it is absent."""
    root = Path(os.environ.get("GATES_SHARED", TESTS.parents[1] / "shared"))
    if not (root / "data/endoscopy").is_dir():
        pytest.skip(f"{root}/data/endoscopy is absent: set GATES_SHARED")
    return root / "data/endoscopy"
