"""A folder of adapters with an index that finds them."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from diffusion.library.adapter import Adapter, Candidate, required
from diffusion.library.encoders import TextEncoder, WeightEncoder
from diffusion.library.errors import LibraryError
from diffusion.library.filters import Filters
from diffusion.library.finding.search import Mix, Searcher
from diffusion.library.finding.similarity import NEAR, Subject, nearest
from diffusion.library.paths import location_of, look, place_of, real_root
from diffusion.library.result import Match, Neighbor, Results
from diffusion.library.scan import Progress, Scanner, ScanReport
from diffusion.library.store.catalog import Catalog
from diffusion.lora_file import LoraBundle, load_lora
from diffusion.lora_file.container import LIMITS, Limits

INDEX = ".gates-index"
"""Folder of the index in that of the library."""


class LoraLibrary:
    """Adapters below a folder, found by prompts, by their metadata or by likeness.

    The index is a SQLite file of metadata and a file of embeddings. Any number of processes may
    read and write it at once; one that is killed leaves no partial state. Adapters for FLUX.1 and
    SD3 are read in full, of other families only metadata is kept.

    Args:
        root: Folder of the library; only ``.safetensors`` files below it are read.
        encoder: Encodes adapters by their weights; without it only metadata is searched.
        text_encoder: Encodes prompts into the same space.
        index: Folder of the index; ``.gates-index`` in the library if None.
        limits: What a file may cost.
        lenient: Find files that the strict reader refuses by their weights, too.

    Raises:
        LibraryError: A path starts with the home of a user who does not exist.
    """

    def __init__(
        self,
        root: str | Path,
        encoder: WeightEncoder | None = None,
        text_encoder: TextEncoder | None = None,
        *,
        index: str | Path | None = None,
        limits: Limits = LIMITS,
        lenient: bool = False,
    ) -> None:
        self.root = place_of(root)
        self.encoder = encoder
        self.text_encoder = text_encoder
        self.index = self.root / INDEX if index is None else place_of(index)
        self.limits = limits
        self.lenient = lenient
        self._opened: Catalog | None = None
        self._searcher: Searcher | None = None

    def __enter__(self) -> "LoraLibrary":
        """Return the library."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the index."""
        self.close()

    def close(self) -> None:
        """Close the index; the next call opens it again."""
        if self._opened is not None:
            self._opened.database.close()
        self._opened = self._searcher = None

    def scan(self, progress: Progress | None = None) -> ScanReport:
        """Bring the index up to date; files whose size and time are unchanged are not opened.

        Args:
            progress: Called with the files that are done, and all of them as far as they are known.

        Raises:
            LibraryError: The library cannot be read, or the index cannot be written.
        """
        return self._scanner().scan(progress or _nothing)

    def add(self, path: str | Path) -> Adapter:
        """Index one file below the root.

        Args:
            path: Of the file, also relative to the root.

        Raises:
            LibraryError: It lies elsewhere, cannot be read, or the index cannot be written.
        """
        location = location_of(self.root, Path(path))
        found = look(self.root, location)
        scanner = self._scanner()
        scanner.read([found], _nothing)
        scanner.encode(_nothing)
        adapter = required(scanner.catalog.at(location), str(path))
        if adapter.error:
            raise LibraryError(f"{adapter.path} cannot be indexed: {adapter.error}")
        return adapter

    def remove(self, name: str) -> None:
        """Remove an adapter from the index, not from the disk; a scan finds it again.

        Args:
            name: Its name, or its path below the root.

        Raises:
            LibraryError: There is none, or the index cannot be written.
        """
        catalog = self._catalog(create=True)
        row = catalog.row(self.find(name).id)
        if row is not None:
            catalog.forget([row["location"]])

    def adapters(
        self, family: str | None = None, license: str | None = None, tag: str | None = None
    ) -> list[Adapter]:
        """Return all files of the index that pass filters, in the order of their ids."""
        return self._catalog().adapters(Filters(family, license, tag))

    def find(self, name: str) -> Adapter:
        """Return an adapter by its name, or by its path below the root.

        Raises:
            LibraryError: There is none; the message names similar ones.
        """
        catalog = self._catalog()
        return required(catalog.named(name), name, catalog.names)

    def path(self, name: str) -> Path:
        """Return where the file of an adapter lies; it does not lie outside of the root.

        Args:
            name: Its name, or its path below the root.

        Raises:
            LibraryError: There is none, or the file is gone or leads elsewhere.
        """
        row = self._catalog().row(self.find(name).id)
        return look(self.root, (row or {})["location"]).target

    def load(
        self, name: str, base: str | Mapping[str, tuple[int, int]] | None = None
    ) -> LoraBundle:
        """Read an adapter.

        Args:
            name: Its name, or its path below the root.
            base: See :func:`diffusion.lora_file.load_lora`.

        Raises:
            LibraryError: There is none, or the file is gone or leads elsewhere.
            LoraFileError: It cannot be used.
        """
        return load_lora(self.path(name), base, strict=not self.lenient, limits=self.limits)

    def search(
        self,
        prompt: str,
        k: int = 3,
        mode: str = "weights",
        *,
        family: str | None = None,
        license: str | None = None,
        tag: str | None = None,
        weights: float = 1.0,
        metadata: float = 0.0,
    ) -> Results[Match]:
        """Return the adapters that suit a prompt best; equal scores go to the lowest id.

        Args:
            prompt: Text; nothing in it is an operator.
            k: Adapters wanted; files with the same content count once.
            mode: ``weights``: cosine of prompt and weights; ``metadata``: BM25 of prompt and
                metadata; ``hybrid``: both.
            family: Only those of this family.
            license: Only those of this license.
            tag: Only those with this tag.
            weights: Weight a of the cosine in a hybrid search.
            metadata: Weight b of BM25 over the largest one in a hybrid search; with the default of
                0, the ranking is free of metadata.

        Returns:
            Results with a notice where weights could not be searched, or not those of all adapters.

        Raises:
            LibraryError: An argument is wrong, or nothing is indexed.
        """
        if self._searcher is None:
            catalog = self._catalog()
            self._searcher = Searcher(catalog, self.encoder, self.text_encoder, self.lenient)
        filters = Filters(family, license, tag)
        return self._searcher.search(prompt, k, mode, Mix(weights, metadata), filters)

    def like(
        self, file: str | Path, k: int = 3, progress: Progress | None = None
    ) -> Results[Neighbor]:
        """Return the adapters whose ΔW has the largest cosine with that of a file.

        Args:
            file: Name of an adapter of the library, its path below the root, or any other file.
            k: Adapters wanted.
            progress: Called with the adapters that are decided, and all of them.

        Raises:
            LibraryError: k is not positive, the file changes nothing, or nothing is indexed.
            LoraFileError: The file cannot be read.
        """
        if k < 1:
            raise LibraryError(f"k is {k}, expected 1 or more")
        catalog = self._catalog()
        own = catalog.named(str(file))
        place = place_of(file) if own is None else self.path(own.name)
        if own is None and not os.path.lexists(place):
            required(None, str(file), catalog.names)
        subject = Subject(load_lora(place, strict=False, limits=self.limits))
        found = [
            one for one in catalog.candidates(subject.family) if own is None or one.id != own.id
        ]
        count = progress or _nothing
        likely, others, unread = nearest(
            subject, found, k, self._read, lambda done: count(done, len(found))
        )
        adapters = catalog.by_ids([one.id for one in likely])
        notices = [
            f"{others} of {len(found)} adapters are for models of another size" if others else "",
            f"{unread} have changed or gone since the last scan" if unread else "",
            "" if found else f"no other adapter is for {subject.family}",
        ]
        neighbors = (
            Neighbor(adapters[one.id], one.cosine, one.cosine >= NEAR, one.shared)
            for one in likely
            if one.id in adapters
        )
        return Results(tuple(neighbors), "similarity", "; ".join(filter(None, notices)))

    def _read(self, candidate: Candidate) -> LoraBundle:
        """Read an adapter as it was indexed.

        Raises:
            LibraryError: It has changed, is gone or leads elsewhere.
            LoraFileError: It cannot be read.
        """
        found = look(self.root, candidate.location)
        if not self._catalog().is_unchanged(found):
            raise LibraryError(f"{candidate.location!r} has changed since the last scan")
        return load_lora(found.target, strict=False, limits=self.limits)

    def _scanner(self) -> Scanner:
        real_root(self.root)
        catalog = self._catalog(create=True)
        return Scanner(self.root, catalog, self.encoder, self.limits, self.lenient)

    def _catalog(self, *, create: bool = False) -> Catalog:
        if self._opened is None or (create and not self._opened.database.writable):
            self.close()
            self._opened = Catalog(self.index, create=create)
        return self._opened


def _nothing(*counts: int) -> None:
    """Show no progress."""
