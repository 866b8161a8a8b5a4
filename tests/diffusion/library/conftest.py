"""Folders of adapters, and what an index holds of them."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffusion.library import LoraLibrary
from diffusion.library.database import Matrix

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def encoders():
    """``Probes``, ``Words``, ``DIM``."""
    return SimpleNamespace(**runpy.run_path(str(HERE / "encoders.py")))


@pytest.fixture(scope="session")
def put(dialects):
    """Write a file of a few layers: ``put(path, seed, metadata, names, kind, prefix, layers)``."""

    def write(path, seed=0, metadata=None, names="bfl", kind="lora_down", **options):
        prefix = options.pop("prefix", "lora_unet_" if names == "bfl" else "transformer.")
        path.parent.mkdir(parents=True, exist_ok=True)
        options = {"layers": 3, **options}
        return dialects.write(names, kind, prefix, seed=seed, **options).save(path, metadata)

    return write


@pytest.fixture(scope="session")
def put_sdxl():
    """Write a file of another family."""

    def write(path, metadata=None, seed=0):
        name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
        torch.manual_seed(seed)
        tensors = {
            f"{name}.lora_down.weight": torch.randn(2, 2048),
            f"{name}.lora_up.weight": torch.randn(8, 2),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata)
        return path

    return write


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "library"
    folder.mkdir()
    return folder


@pytest.fixture
def library(root, encoders):
    """A library with both encoders, which leaves nothing out."""
    with LoraLibrary(root, encoders.Probes(), encoders.Words(), least=-1) as found:
        yield found


@pytest.fixture(scope="session")
def state():
    """All that an index holds, without row numbers of the matrix: equal for equal indexes."""

    def read(library):
        database = library._catalog().database
        adapters = "id, location, name, size, mtime_ns, config, sha256, digest, family, title"
        more = "dialect, hex(modules), hex(norms), triggers, tags, license, flags, problem, error"
        found = {
            "adapters": database.all(f"SELECT {adapters}, {more} FROM adapter ORDER BY id"),
            "tags": database.all("SELECT * FROM tag"),
            "modules": database.all("SELECT * FROM module"),
            "words": database.all("SELECT rowid, * FROM words ORDER BY rowid"),
        }
        for fingerprint, dim in database.all("SELECT * FROM matrix"):
            view = Matrix(library.index, fingerprint, dim).view()
            query = "SELECT digest, row, refusal FROM encoding WHERE fingerprint = ? ORDER BY 1"
            rows = database.all(query, (fingerprint,))
            found[fingerprint] = [
                (digest, refusal, None if row is None else np.array(view[row]).tobytes())
                for digest, row, refusal in rows
            ]
        return found

    return read
