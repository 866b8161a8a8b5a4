"""Search by vectors in a library of 10⁵ adapters, against the bare matmul and its k best scores."""

import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.diffusion.scan import write_adapter
from benchmarks.registry import Call, Comparison, Load, Work

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
        build=_variants,
        baseline="matmul and top-k",
        bars={"search": BAR},
        work=Work(bytes=4.0 * ADAPTERS * DIM, flops=2.0 * ADAPTERS * DIM),
        memory=8.0 * ADAPTERS * DIM,
    )


def _variants(load: Load) -> Mapping[str, Call]:
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
