"""Libraries of adapters: searched, and scanned again."""

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.comparison import Call, Comparison, Load, Work

FILES, FIRST = 10_000, 500
"""Files of the second scan and of the first, whose times are given per file."""

SCAN_BAR = 0.1


def comparisons() -> Iterator[Comparison]:
    """A search, then a scan of files that were scanned before; on one CPU thread."""
    yield search()
    yield rescan()


def rescan() -> Comparison:
    """Compare what a file costs that is unchanged with what a new one costs."""
    return Comparison(
        name=f"scan of {FILES} files",
        op="library_scan",
        build=_variants,
        baseline="first scan",
        bars={"unchanged": SCAN_BAR},
        units={"first scan": FIRST, "unchanged": FILES},
        unit="file",
    )


def write_adapter(path: Path, seed: int = 0, layers: int = 3) -> None:
    """Write a random file with the names of kohya, of layers of width 16."""
    draw, tensors = torch.Generator().manual_seed(seed), {}
    for number in range(layers):
        name = f"lora_unet_double_blocks_{number}_img_attn_proj"
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, 16, generator=draw)
        tensors[f"{name}.lora_up.weight"] = torch.randn(16, 2, generator=draw)
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(tensors, path)


def _variants(load: Load) -> Mapping[str, Call]:
    folder = tempfile.TemporaryDirectory()
    root, few = Path(folder.name) / "many", Path(folder.name) / "few"
    for place, number in ((root, FILES), (few, FIRST)):
        place.mkdir()
        for seed in range(number):
            write_adapter(place / f"{seed}.safetensors", seed)
    kind = load("diffusion.library").LoraLibrary
    library = kind(root)
    library.scan()

    def first() -> object:
        index = Path(folder.name) / "index"
        with kind(few, index=index) as new:
            found = new.scan()
        shutil.rmtree(index)
        return found

    def again() -> object:
        return library.scan()

    def end() -> None:
        library.close()
        folder.cleanup()

    weakref.finalize(again, end)
    return {"first scan": first, "unchanged": again}


ADAPTERS, DIM, K = 100_000, 768, 10
BAR = 1.5


class Encoder:
    """Stands for an encoder of adapters, and for one of prompts."""

    family, fingerprint = "flux", "random"

    def __init__(self, query: Tensor) -> None:
        self.query, self.dim = query, len(query)

    def refusal(self, bundle: object) -> str | None:
        """Return that any adapter fits."""
        del bundle
        return None

    def encode(self, bundle: object) -> Tensor:
        """Return the query."""
        del bundle
        return self.query

    def embed(self, texts: list[str]) -> Tensor:
        """Return the query for each text."""
        return self.query.expand(len(texts), -1)


def search() -> Comparison:
    """Compare a search by a prompt, names and scores included, with what it cannot spare."""
    return Comparison(
        name=f"search in {ADAPTERS} x {DIM}, k={K}",
        op="library_search",
        build=_search_variants,
        baseline="matmul and top-k",
        bars={"search": BAR},
        work=Work(bytes=4.0 * ADAPTERS * DIM, flops=2.0 * ADAPTERS * DIM),
        memory=8.0 * ADAPTERS * DIM,
    )


def _search_variants(load: Load) -> Mapping[str, Call]:
    folder = tempfile.TemporaryDirectory()
    root = Path(folder.name)
    vectors = np.random.default_rng(0).normal(size=(ADAPTERS, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    query = torch.from_numpy(vectors[0] + 0.05 * vectors[1])
    encoder = Encoder(query / query.norm())
    library = load("diffusion.library").LoraLibrary(root, encoder, encoder)
    write_adapter(root / "a1.safetensors", layers=1)
    library.scan()
    _fill(load, library, vectors)
    view = load("diffusion.library.database").Matrix(library.index, encoder.fingerprint, DIM).view()
    wanted = encoder.query.numpy()

    def bare() -> object:
        scores = view @ wanted
        near = np.argpartition(scores, -K)[-K:]
        return near[np.argsort(-scores[near])]

    def whole() -> object:
        return library.search("a prompt", K)

    def end() -> None:
        library.close()
        folder.cleanup()

    weakref.finalize(whole, end)
    return {"matmul and top-k": bare, "search": whole}


def _fill(load: Load, library: Any, vectors: np.ndarray[Any, Any]) -> None:
    """Copy the one row of the index, each copy with its own path, name and content."""
    schema = load("diffusion.library.database")
    catalog = load("diffusion.library.catalog").Catalog(library.index, create=True)
    own = {
        "location": "CAST('a' || i || '.safetensors' AS BLOB)",
        "name": "'a' || i",
        "sha256": "'s' || i",
        "digest": "'d' || i",
    }
    columns = ", ".join(schema.COLUMNS)
    values = ", ".join(own.get(column, column) for column in schema.COLUMNS)
    numbers = (
        f"WITH RECURSIVE n (i) AS (SELECT 2 UNION ALL SELECT i + 1 FROM n WHERE i < {ADAPTERS})"
    )
    with catalog.database.writing():
        catalog.database.run(
            f"{numbers} INSERT INTO adapter ({columns}) "
            f"SELECT {values} FROM adapter, n WHERE id = 1"
        )
        catalog.database.run(
            f"{numbers} INSERT INTO encoding (fingerprint, digest, row, refusal) "
            "SELECT fingerprint, 'd' || i, i - 1, '' FROM encoding, n WHERE row = 0"
        )
    matrix = load("diffusion.library.database").Matrix(library.index, Encoder.fingerprint, DIM)
    matrix.write(dict(enumerate(vectors)))
    catalog.database.close()
