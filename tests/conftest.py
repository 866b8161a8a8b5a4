import os
import runpy
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("TRITON_INTERPRET", "1")  # read once, when triton is first imported
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

HERE = Path(__file__).parent

# No deadline, because other processes share the cores; the same examples on every run.
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")


@pytest.fixture(scope="session")
def ranks():
    """``ranks(function, *args, world_size=2, timeout=120)`` runs a function on gloo processes."""
    return runpy.run_path(str(HERE / "distributed" / "launch.py"))["run_on_ranks"]


def pytest_collection_modifyitems(items):
    for item in items:
        if "ranks" in getattr(item, "fixturenames", ()):
            item.add_marker("distributed")
