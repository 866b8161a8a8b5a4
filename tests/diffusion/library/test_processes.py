"""Scans that are killed, and two at once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffusion.library import LoraLibrary
from diffusion.library.database import Matrix

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
FILES = 8

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(scope="module")
def scanned(put, put_sdxl, encoders, state, tmp_path_factory):
    """Kind of an index to what it and its matrix hold, of several folders, and the kills."""
    root, scratch = tmp_path_factory.mktemp("library"), tmp_path_factory.mktemp("scratch")
    for seed in range(FILES - 3):
        put(root / f"{seed % 3}/{seed}.safetensors", seed, layers=1)
        if seed < 3:
            put(root / f"old{seed}.safetensors", 90 + seed)
    put_sdxl(root / "x.safetensors", {"modelspec.tags": "cat, dog"})
    put(root / "copy.safetensors", 0, layers=1)
    (root / "broken.safetensors").write_bytes(b"no")
    command = [sys.executable, str(HERE / "killing.py"), str(root), str(scratch)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    def held(index):
        with LoraLibrary(root, encoders.Probes(), index=index) as library:
            rows = len(Matrix(library.index, library.encoder.fingerprint, encoders.DIM))
            return state(library), rows

    told = json.loads(done.stdout)
    finished = [held(index) for index in told["finished"]]
    return held(told["whole"]), finished, held(told["both"]), told["killed"]


def test_a_scan_that_is_killed_and_repeated_ends_like_another(scanned):
    whole, finished, _, killed = scanned
    assert len(whole[0]["adapters"]) == FILES
    assert whole[1] == FILES - 3  # neither the broken one, nor that for SDXL, nor the copy
    assert killed >= 14
    assert len(finished) >= killed
    assert all(held == whole for held in finished)


def test_two_processes_at_once_end_with_each_file_once(scanned):
    whole, _, both, _ = scanned
    assert both == whole
