"""Which adapters are found by their weights, kept in memory as long as the index stays."""

from collections import Counter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffusion.library.encoders import WeightEncoder
from diffusion.library.filters import Filters
from diffusion.library.store.catalog import Catalog
from diffusion.library.store.matrix import Matrix, Vectors

_MOST = 16


class Served(NamedTuple):
    """The adapters that are found by their weights.

    Attributes:
        ids: Of adapters (n,), ascending.
        rows: Of the matrix (n,).
        copies: Adapters that share a row with an earlier one.
        plain: Whether the rows are 0, 1, …, n − 1.
        view: The matrix.
        lacking: How many other adapters there are, and of which families; empty if there are none.
    """

    ids: NDArray[np.int64]
    rows: NDArray[np.int64]
    copies: int
    plain: bool
    view: Vectors
    lacking: str = ""


class Serving:
    """Looks up what an encoder has encoded.

    Args:
        catalog: Of the index.
        encoder: Whose embeddings are searched.
        lenient: Whether adapters count that the strict reader refuses.
    """

    def __init__(self, catalog: Catalog, encoder: WeightEncoder, lenient: bool) -> None:
        self._catalog = catalog
        self._encoder = encoder
        self._lenient = lenient
        self._version: tuple[int, int] | None = None
        self._known: dict[Filters, Served] = {}

    def of(self, filters: Filters) -> Served:
        """Return the adapters that pass filters."""
        version = self._catalog.database.version()
        if version != self._version or len(self._known) >= _MOST:
            self._known.clear()
            self._version = version
        if filters not in self._known:
            self._known[filters] = self._look_up(filters)
        return self._known[filters]

    def _look_up(self, filters: Filters) -> Served:
        encoder = self._encoder
        view = Matrix(self._catalog.folder, encoder.fingerprint, encoder.dim).view()
        condition, values = filters.sql()
        values |= {"own": encoder.fingerprint, "lenient": self._lenient, "end": len(view)}
        usable = "a.searchable AND (:lenient OR a.problem = '') AND e.row < :end"
        join = (
            "FROM adapter a LEFT JOIN encoding e ON e.fingerprint = :own AND e.digest = a.digest "
            f"WHERE a.error = '' AND {condition}"
        )
        pairs = self._catalog.database.all(
            f"SELECT a.id, e.row {join} AND {usable} ORDER BY a.id", values
        )
        ids, rows = np.array(pairs, np.int64).reshape(-1, 2).T.copy()
        families = self._catalog.database.all(
            f"SELECT a.family {join} AND COALESCE({usable}, 0) = 0", values
        )
        plain = bool((rows == np.arange(len(rows))).all())
        copies = len(rows) - len(np.unique(rows))
        lacking = self._lacking(Counter(family for (family,) in families), len(ids))
        return Served(ids, rows, copies, plain, view, lacking)

    def _lacking(self, families: Counter[str], served: int) -> str:
        """Return how many adapters are not served, and of which families they are."""
        if not families:
            return ""
        count = families.total()
        listed = ", ".join(f"{number} {name}" for name, number in families.most_common(4))
        return (
            f"{count} of {count + served} adapters have no embedding of this encoder, which serves "
            f"{self._encoder.family} ({listed})"
        )
