"""A folder of adapters with an index that finds them, brought up to date by scans."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, TypeVar

import torch

from diffusion.library.catalog import Catalog, Encoded
from diffusion.library.database import Matrix, unit_vector
from diffusion.library.paths import (
    Found,
    LibraryError,
    Refused,
    gone,
    location_of,
    look,
    place_of,
    real_root,
    shown,
    walk,
)
from diffusion.library.record import (
    REASONS,
    Adapter,
    Candidate,
    Filters,
    Match,
    Neighbor,
    Record,
    Results,
    TextEncoder,
    WeightEncoder,
    read_record,
    required,
)
from diffusion.library.searcher import NEAR, Mix, Searcher, Subject, nearest
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


class Scanner:
    """Reads files and keeps what they hold, a batch at a time.

    Args:
        root: Of the library.
        catalog: Of its index.
        encoder: None if only metadata is kept.
        limits: What a file may cost.
        lenient: Encode files that the strict reader refuses, too.
    """

    def __init__(
        self,
        root: Path,
        catalog: Catalog,
        encoder: WeightEncoder | None,
        limits: Limits,
        lenient: bool,
    ) -> None:
        self.root, self.catalog, self.encoder, self.limits = root, catalog, encoder, limits
        self.lenient = lenient

    def scan(self, progress: Progress) -> ScanReport:
        """Read what is new or has changed, encode what is not, forget what is gone.

        Raises:
            LibraryError: The folder cannot be read, or the index cannot be written.
        """
        files, refused = walk(self.root)
        before = set(self.catalog.locations())
        same = self.catalog.unchanged(files)
        progress(len(same), len(files))
        new = [one for one in files if one.location not in same]
        self.read(new, lambda done: progress(len(same) + done, len(files)))
        encoded = self.encode(lambda done, all: progress(len(files) + done, len(files) + all))
        absent = before - {one.location for one in files}
        absent = {location for location in absent if gone(self.root, location)}
        removed = self.catalog.forget(sorted(absent)) if absent else 0
        if self.encoder is not None:
            self.catalog.drop_unused(self.encoder.family, self.encoder.fingerprint)
        failed = self.catalog.failed()
        unread = [Refused(shown(location), why) for location, why in failed.items()]
        good = [one.location for one in new if one.location not in failed]
        added = sum(location not in before for location in good)
        return ScanReport(
            added,
            len(good) - added,
            len(same - failed.keys()),
            removed,
            encoded,
            tuple(sorted([*refused, *unread])),
            tuple(self._unencoded()),
            tuple(self.catalog.repeated()),
        )

    def read(self, files: Sequence[Found], done: Callable[[int], object]) -> None:
        """Read files and keep their records."""

        def records() -> Iterator[Record]:
            for number, found in enumerate(files, 1):
                yield read_record(found, self.limits, self.catalog.record)
                done(number)

        for batch in _batches(records()):
            self.catalog.keep(batch)

    def encode(self, progress: Progress) -> int:
        """Encode the contents that the encoder has not seen, and return their number.

        Raises:
            LibraryError: The encoder gives no vector of its size.
        """
        encoder = self.encoder
        if encoder is None:
            return 0
        matrix = Matrix(self.catalog.folder, encoder.fingerprint, encoder.dim)
        self.catalog.drop_lost(matrix, encoder.fingerprint)
        pending = self.catalog.pending(encoder.family, encoder.fingerprint, self.lenient)
        count = 0

        def encodings() -> Iterator[Encoded]:
            for number, (digest, location) in enumerate(pending, 1):
                if (encoded := self._encode(encoder, digest, location)) is not None:
                    yield encoded
                progress(number, len(pending))

        for batch in _batches(encodings()):
            self.catalog.keep_encodings(matrix, encoder.fingerprint, batch)
            count += sum(one.vector is not None for one in batch)
        return count

    def _encode(self, encoder: WeightEncoder, digest: str, location: bytes) -> Encoded | None:
        """Encode a file; None if it has changed or gone since it was read."""
        try:
            found = look(self.root, location)
            if not self.catalog.is_unchanged(found):
                return None
            bundle = load_lora(found.target, strict=False, limits=self.limits)
        except (LibraryError, LoraFileError):
            return None
        try:
            if (refusal := encoder.refusal(bundle)) is None:
                with torch.no_grad():
                    return Encoded(digest, unit_vector(encoder.encode(bundle), encoder.dim))
        except LoraFileError as error:
            refusal = str(error)
        return Encoded(digest, None, clean(refusal, 300) or "the encoder refuses it")

    def _unencoded(self) -> Iterator[Refused]:
        """Yield files that the encoder has not encoded, and why."""
        if self.encoder is None:
            return
        for location, family, flags, problem, refusal in self.catalog.unencoded(
            self.encoder.fingerprint
        ):
            reasons = [REASONS[flag] for flag in flags if flag in REASONS]
            if family != self.encoder.family:
                served = self.encoder.family
                reasons = [f"it is for {family or 'unknown models'}, the encoder serves {served}"]
            if problem and not self.lenient:
                reasons.append(problem)
            yield Refused(shown(location), refusal or "; ".join(reasons) or "it has changed")


def _batches(items: Iterator[T]) -> Iterator[list[T]]:
    """Yield items in lists, each of a few seconds at most."""
    batch: list[T] = []
    begin = time.monotonic()
    for item in items:
        batch.append(item)
        if len(batch) == _BATCH or time.monotonic() - begin > _SECONDS:
            yield batch
            batch, begin = [], time.monotonic()
    if batch:
        yield batch


INDEX = ".gates-index"  # folder of the index in that of the library


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
        least: Smallest cosine of prompt and weights of what a search finds; by default the .99
            quantile of the cosines of prompts that ask for no image, among the adapters of the
            index.

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
                f"the least score is {least}, expected a cosine from -1 to 1 where an encoder is "
                "given: leave it out"
            )
        self.root, self.least = place_of(root), least
        self.encoder, self.text_encoder = encoder, text_encoder
        self.index = self.root / INDEX if index is None else place_of(index)
        self.limits, self.lenient = limits, lenient
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
            mode: ``weights``: cosine of prompt and weights; ``metadata``: fraction of the words of
                the prompt that the metadata hold, equal ones by BM25; ``hybrid``: both.
            family: Only those of this family.
            license: Only those of this license.
            tag: Only those with this tag.
            weights: Weight a of the cosine in a hybrid search.
            metadata: Weight b of that fraction in a hybrid search; with the default of 0, the
                ranking is free of metadata.

        Returns:
            Results with a notice where weights could not be searched, or not those of all adapters.
            What scores less than ``least`` by its weights, and is not found by its metadata either,
            is left out.

        Raises:
            LibraryError: An argument is wrong, or nothing is indexed.
        """
        if self._searcher is None:
            catalog = self._catalog()
            encoders = self.encoder, self.text_encoder
            self._searcher = Searcher(catalog, *encoders, self.lenient, self.least)
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
