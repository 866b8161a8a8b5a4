"""A folder of adapters with an index that finds them, brought up to date by scans."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from diffusion.library.database import Catalog, Database, Matrix, Vectors
from diffusion.library.paths import (
    Found,
    LibraryError,
    Refused,
    gone,
    location_of,
    look,
    names_of,
    place_of,
    walk,
)
from diffusion.library.record import (
    Adapter,
    Filters,
    Match,
    Neighbor,
    Results,
    TextEncoder,
    WeightEncoder,
    read_record,
)
from diffusion.library.searcher import Mix, Searcher, Subject, nearest_adapters, unit_vector
from diffusion.lora_file import LoraBundle, LoraFileError, load_lora
from diffusion.lora_file.container import LIMITS, Limits, clean

Progress = Callable[[int, int], object]
"""Called with the files that are done, and all of them as far as they are known."""

T = TypeVar("T")

_BATCH, _SECONDS = 64, 2.0


class ScanReport(NamedTuple):
    """What a scan found.

    Attributes:
        added: Files that the index did not have.
        changed: Files that it had with another content.
        unchanged: Files that were not opened.
        removed: Files that are gone.
        encoded: Contents that the encoder has encoded.
        refused: Files that cannot be read, the unchanged ones included.
        unencoded: Files that are found by their metadata alone, and why.
        duplicates: Path of each file with the content of an earlier one, and that one's path.
    """

    added: int
    changed: int
    unchanged: int
    removed: int
    encoded: int
    refused: tuple[Refused, ...]
    unencoded: tuple[Refused, ...]
    duplicates: tuple[tuple[str, str], ...]

    @property
    def kept(self) -> int:
        """Files that can be searched."""
        return self.added + self.changed + self.unchanged


INDEX = ".gates-index"  # folder of the index in that of the library


class LoraLibrary(AbstractContextManager["LoraLibrary"]):
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
        least: Smallest cosine of prompt and weights of what a search finds; by default the
            one that the best adapter of the index does not reach for nine in ten prompts of images
            that adapters hardly ever draw.

    Raises:
        LibraryError: A path starts with the home of a user who does not exist, or ``least`` is not
            a cosine, or is given without an encoder.
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
        least: float | None = None,
    ) -> None:
        if least is not None and (encoder is None or not -1 <= least <= 1):
            raise LibraryError(
                f"--least is {least}, expected a cosine from -1 to 1 where an encoder is "
                "given: leave it out"
            )
        self.root, self.least = place_of(root), least
        self.encoder, self.text_encoder = encoder, text_encoder
        self.index = self.root / INDEX if index is None else place_of(index)
        self.limits, self.lenient = limits, lenient
        self._searcher: Searcher | None = None

    def __exit__(self, *error: object) -> None:
        """Close the index."""
        self.close()

    def close(self) -> None:
        """Close the index; the next call opens it again."""
        if self._searcher is not None:
            self._searcher.catalog.database.close()
        self._searcher = None

    def scan(self, progress: Progress | None = None) -> ScanReport:
        """Bring the index up to date; files whose size and time are unchanged are not opened.

        Args:
            progress: Called with the files that are done, and all of them as far as they are known.

        Raises:
            LibraryError: The library cannot be read, or the index cannot be written.
        """
        files, refused = walk(self.root)
        catalog, count = self._catalog(create=True), progress or _nothing
        before = {row[0] for row in catalog.database.all("SELECT location FROM adapter")}
        same = {file.location for file in files if catalog.is_unchanged(file)}
        count(len(same), len(files))
        new = [file for file in files if file.location not in same]
        self._keep(new, lambda done: count(len(same) + done, len(files)))
        encoded = self._encode(lambda done, all: count(len(files) + done, len(files) + all))
        missing = sorted(before - {file.location for file in files})
        absent = [location for location in missing if gone(self.root, location)]
        removed = catalog.forget(absent) if absent else 0
        _rename(catalog)
        unencoded: tuple[Refused, ...] = ()
        if (encoder := self.encoder) is not None:
            catalog.drop_unused(encoder.family, encoder.fingerprint)
            unencoded = tuple(catalog.unencoded(encoder, self.lenient))
        failed = {
            refused.location: Refused(refused.path, refused.error)
            for refused in catalog.adapters("error <> ''")
        }
        good = [file.location for file in new if file.location not in failed]
        added = sum(location not in before for location in good)
        return ScanReport(
            added,
            len(good) - added,
            len(same - failed.keys()),
            removed,
            encoded,
            tuple(sorted([*refused, *failed.values()])),
            unencoded,
            tuple(catalog.repeated()),
        )

    def add(self, path: str | Path) -> Adapter:
        """Index one file below the root.

        Args:
            path: Of the file, also relative to the root.

        Raises:
            LibraryError: It lies elsewhere, cannot be read, or the index cannot be written.
        """
        location = location_of(self.root, Path(path))
        self._keep([look(self.root, location)], _nothing)
        self._encode(_nothing)
        kept = self._catalog().adapters("location = ?", (location,))
        adapter = kept[0] if kept else self.find(str(path))
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
        catalog.forget([self.find(name).location])
        _rename(catalog)

    def adapters(
        self, family: str | None = None, license: str | None = None, tag: str | None = None
    ) -> list[Adapter]:
        """Return all files of the index that pass filters, in the order of their ids."""
        return self._catalog().adapters(*Filters(family, license, tag).sql())

    def find(self, name: str) -> Adapter:
        """Return an adapter by its name, or by its path below the root.

        Raises:
            LibraryError: There is none; the message names similar ones.
        """
        return self._catalog().find(name)

    def path(self, name: str) -> Path:
        """Return where the file of an adapter lies; it does not lie outside of the root.

        Args:
            name: Its name, or its path below the root.

        Raises:
            LibraryError: There is none, or the file is gone or leads elsewhere.
        """
        return look(self.root, self.find(name).location).target

    def load(
        self, name: str, base: str | Mapping[str, tuple[int, int]] | None = None
    ) -> LoraBundle:
        """Read an adapter.

        Args:
            name: Its name, or its path below the root.
            base: See `diffusion.lora_file.load_lora`.

        Raises:
            LibraryError: There is none, or the file is gone or leads elsewhere.
            LoraFileError: It cannot be used.
        """
        return load_lora(self.path(name), base, strict=not self.lenient, limits=self.limits)

    def search(
        self,
        prompt: str,
        k: int = 3,
        mode: str = "names",
        *,
        family: str | None = None,
        license: str | None = None,
        tag: str | None = None,
        weights: float = 1.0,
        metadata: float = 0.0,
        whole: bool = False,
    ) -> Results[Match]:
        """Return the adapters that suit a prompt best; equal scores go to the lowest id.

        Args:
            prompt: Text; nothing in it is an operator.
            k: Adapters wanted; files with the same content count once.
            mode: ``names``: adapters whose name, title or trigger the prompt holds, then others,
                all by the cosine of prompt and weights; ``weights``: by this cosine alone;
                ``metadata``: fraction of the words of the prompt that the metadata hold, equal ones
                by BM25; ``hybrid``: both.
            family: Only those of this family.
            license: Only those of this license.
            tag: Only those with this tag.
            weights: Weight a of the cosine in a hybrid search.
            metadata: Weight b of that fraction in a hybrid search; with the default of 0, the
                ranking is free of metadata.
            whole: Leave nothing out for a low cosine where the best is high enough and none is
                named, for a gate that compares all.

        Returns:
            Results with a notice where weights could not be searched, or not those of all adapters.
            What scores less than ``least`` by its weights, and is neither named nor found by its
            metadata, is left out.

        Raises:
            LibraryError: An argument is wrong, or nothing is indexed.
        """
        filters = Filters(family, license, tag)
        mix = Mix(weights, metadata)
        return self._opened().search(prompt, k, mode, mix, filters, whole=whole)

    def similarities(self, names: Sequence[str]) -> tuple[Vectors, str]:
        """Return the cosines of the embeddings of K adapters (K, K), and the encoder's fingerprint.

        Raises:
            LibraryError: There is no encoder, or an adapter is unknown or not encoded.
        """
        return self._opened().similarities(names)

    def like(
        self,
        file: str | Path,
        k: int = 3,
        progress: Progress | None = None,
        *,
        family: str | None = None,
        license: str | None = None,
        tag: str | None = None,
    ) -> Results[Neighbor]:
        """Return the adapters whose ΔW has the largest cosine with that of a file.

        Args:
            file: Name of an adapter of the library, its path below the root, or any other file.
            k: Adapters wanted.
            progress: Called with the adapters that are decided, and all of them.
            family: Only those of this family.
            license: Only those of this license.
            tag: Only those with this tag.

        Raises:
            LibraryError: k is not positive, the file changes nothing, or nothing is indexed.
            LoraFileError: The file cannot be read.
        """
        if k < 1:
            raise LibraryError(f"--k is {k}, expected 1 or more")
        catalog = self._catalog()
        subject_row: Adapter | None = None
        try:
            subject_row = catalog.find(str(file))
        except LibraryError:
            if not os.path.lexists(place_of(file)):
                raise
        place = place_of(file) if subject_row is None else self.path(subject_row.name)
        subject = Subject(load_lora(place, strict=False, limits=self.limits))
        filters = Filters(family, license, tag)
        passing = {adapter.id for adapter in catalog.adapters(*filters.sql())} - {
            subject_row and subject_row.id
        }
        pairs = [pair for pair in catalog.candidates(subject.family) if pair[0].id in passing]
        neighbors, others, unread = nearest_adapters(
            subject, pairs, k, self._read, lambda n: (progress or _nothing)(n, len(pairs))
        )
        notices = [
            f"{others} of {len(pairs)} adapters are for models of another size" if others else "",
            f"{unread} have changed or gone since the last scan" if unread else "",
            "" if pairs else f"no other adapter is for {subject.family}, {filters}".rstrip(", "),
        ]
        return Results(neighbors, "similarity", "; ".join(filter(None, notices)))

    def _read(self, adapter: Adapter) -> LoraBundle:
        """Read an adapter as it was indexed.

        Raises:
            LibraryError: It has changed, is gone or leads elsewhere.
            LoraFileError: It cannot be read.
        """
        file = look(self.root, adapter.location)
        if not self._catalog().is_unchanged(file):
            raise LibraryError(f"{adapter.location!r} has changed since the last scan")
        return load_lora(file.target, strict=False, limits=self.limits)

    def _keep(self, files: Sequence[Found], done: Callable[[int], object]) -> None:
        """Read files and keep their records."""
        catalog = self._catalog(create=True)
        records = (read_record(file, self.limits, catalog.record) for file in files)
        for batch in _batches(records, done):
            catalog.keep(batch)
        _rename(catalog)

    def _encode(self, progress: Progress) -> int:
        """Encode the contents that the encoder has not seen, and return their number.

        Raises:
            LibraryError: The encoder gives no vector of its size.
        """
        if (encoder := self.encoder) is None:
            return 0
        catalog = self._catalog(create=True)
        matrix = Matrix(catalog.folder, encoder.fingerprint, encoder.dim)
        catalog.drop_lost(matrix, encoder.fingerprint)
        pending = catalog.pending(encoder, self.lenient)
        made = ((adapter.digest, self._embedding(encoder, adapter)) for adapter in pending)
        count = 0
        for batch in _batches(made, lambda done: progress(done, len(pending))):
            encoded = {digest: vectors for digest, vectors in batch if vectors is not None}
            catalog.keep_encodings(matrix, encoder.fingerprint, encoded)
            count += sum(not isinstance(vectors, str) for vectors in encoded.values())
        return count

    def _embedding(self, encoder: WeightEncoder, adapter: Adapter) -> Vectors | str | None:
        """Encode a file, or return why not; None if it has changed or gone since it was read."""
        try:
            bundle = self._read(adapter)
        except (LibraryError, LoraFileError):
            return None
        try:
            if (refusal := encoder.refusal(bundle)) is None:
                with torch.no_grad():
                    return unit_vector(encoder.encode(bundle), encoder.dim)
        except LoraFileError as error:
            refusal = str(error)
        return clean(refusal, 300) or "the encoder refuses it"

    def _catalog(self, *, create: bool = False) -> Catalog:
        return self._opened(create=create).catalog

    def _opened(self, *, create: bool = False) -> Searcher:
        if self._searcher is None or (create and not self._searcher.catalog.database.writable):
            self.close()
            catalog, encoders = (
                Catalog(self.index, create=create),
                (self.encoder, self.text_encoder),
            )
            self._searcher = Searcher(catalog, *encoders, self.lenient, self.least)
        return self._searcher


def _rename(catalog: Catalog) -> None:
    """Give files the names that follow from the locations of all, whichever came first."""
    database = catalog.database
    if _misnamed(database):
        with database.writing():
            changed = _misnamed(database)
            away = "UPDATE adapter SET name = 'renamed ' || id WHERE id = ?"
            database.run_many(away, [(name,) for _, name in changed])
            database.run_many("UPDATE adapter SET name = ? WHERE id = ?", changed)
            database.run_many("UPDATE words SET name = ? WHERE rowid = ?", changed)


def _misnamed(database: Database) -> list[tuple[str, int]]:
    """Return new names and ids of files that should have other names."""
    rows = database.all("SELECT id, location, name FROM adapter")
    names = names_of(row["location"] for row in rows)
    wanted = [(names[row["location"]], row["id"], row["name"]) for row in rows]
    return [(name, fresh) for name, fresh, old in wanted if name != old]


def _nothing(*counts: int) -> None:
    """Show no progress."""


def _batches(items: Iterable[T], done: Callable[[int], object]) -> Iterator[list[T]]:
    """Yield items in lists, each of a few seconds at most; their numbers are reported."""
    batch: list[T] = []
    begin = time.monotonic()
    for number, item in enumerate(items, 1):
        batch.append(item)
        done(number)
        if len(batch) == _BATCH or time.monotonic() - begin > _SECONDS:
            yield batch
            batch, begin = [], time.monotonic()
    if batch:
        yield batch
