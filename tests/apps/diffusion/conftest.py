"""Verbs on the sample files of known content."""

import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from apps.main import main

GOLDEN = Path(__file__).parents[2] / "golden" / "autolora" / "formats"


@pytest.fixture
def samples(tmp_path, monkeypatch):
    """A working folder with all sample files in ``samples``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    shutil.copytree(GOLDEN, tmp_path / "samples")
    for path in (tmp_path / "samples").glob("*.npz"):
        path.unlink()
    return tmp_path / "samples"


@pytest.fixture
def gates(samples, capsys):
    """Run ``gates diffusion ...`` and return what it prints."""

    def run(*words):
        assert main(["diffusion", *map(str, words)]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="session")
def write():
    """The functions of ``small.py``: ``write.base``, ``adapter``, ``library``, ``gates``."""
    found = runpy.run_path(str(Path(__file__).with_name("small.py")))
    named = {n.removeprefix("write_"): f for n, f in found.items() if n.startswith("write_")}
    return SimpleNamespace(**named, world_of=found["world_of"])


@pytest.fixture(scope="session")
def _small_world(write, tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    base = write.base(folder / "base")
    write.library(folder / "loras")
    write.gates(folder / "gates.safetensors", base, folder / "loras")
    return folder


@pytest.fixture(scope="session")
def zoo_root(write, tmp_path_factory):
    """A folder of runs with a whole embedded world of random weights; not to be changed."""
    root = tmp_path_factory.mktemp("zoo")
    write.world(root)
    return root


@pytest.fixture
def small_world(_small_world, samples, tmp_path):
    """A working folder with a base, adapters ``fox``, ``night`` and ``snow``, and gates."""
    shutil.rmtree(samples)
    shutil.copytree(_small_world, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture(scope="session")
def expected():
    """Return ΔW by layer of a sample, computed by the definitions of the formats."""

    def read(name):
        with np.load(GOLDEN / f"{name}.expected.npz") as arrays:
            return dict(arrays)

    return read


@pytest.fixture(scope="session")
def worst():
    """Return the worst relative error of the layers of an adapter."""

    def measure(bundle, deltas):
        assert set(bundle.modules) == set(deltas)
        return max(
            np.abs(bundle.delta_weight(name).double().numpy() - delta).max() / np.abs(delta).max()
            for name, delta in deltas.items()
        )

    return measure
