"""Fake data sets in official layouts, and tables made by hand."""

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
def damage():
    """``damage(path)``: overwrites the table of Huffman codes, which only decoding finds."""

    def overwrite(path):
        content = bytearray(path.read_bytes())
        start = content.index(b"\xff\xc4")
        content[start + 5 : start + 21] = b"\xff" * 16
        path.write_bytes(bytes(content))

    return overwrite
