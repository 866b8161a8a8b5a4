"""What a search has found."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar, overload

from diffusion.library.adapter import Adapter

T = TypeVar("T")


class Match(NamedTuple):
    """An adapter that a search has found.

    Attributes:
        adapter: Which.
        score: What it is ranked by.
        weights: Cosine of prompt and weights; None if its weights were not searched.
        metadata: BM25 of prompt and metadata over the largest one found, in [0, 1]; None if its
            metadata were not searched.
        duplicates: Paths of other files with the same content.
    """

    adapter: Adapter
    score: float
    weights: float | None
    metadata: float | None
    duplicates: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the adapter."""
        return self.adapter.name

    @property
    def path(self) -> str:
        """Path of the adapter below the root of the library."""
        return self.adapter.path


class Neighbor(NamedTuple):
    """An adapter that is like another one.

    Attributes:
        adapter: Which.
        cosine: Of both ΔW, all layers together, in [-1, 1].
        near_duplicate: Whether the cosine is at least .98.
        shared: Layers that both change.
    """

    adapter: Adapter
    cosine: float
    near_duplicate: bool
    shared: int


@dataclass(frozen=True)
class Results(Sequence[T]):
    """The result of a search, the best first.

    Attributes:
        found: Adapters, each with its scores.
        mode: What was searched: ``weights``, ``metadata``, ``hybrid`` or ``similarity``.
        notice: What a reader of the result has to know, such as why weights were not searched;
            empty if there is nothing.
    """

    found: tuple[T, ...]
    mode: str
    notice: str = ""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[T, ...]: ...
    def __getitem__(self, index: int | slice) -> T | tuple[T, ...]:
        """Return an adapter by its rank, from 0."""
        return self.found[index]

    def __len__(self) -> int:
        """Return the number of adapters."""
        return len(self.found)
