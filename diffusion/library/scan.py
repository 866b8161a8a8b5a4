"""Bring an index up to date with the files below its root."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from diffusion.library.encoders import WeightEncoder
from diffusion.library.errors import LibraryError
from diffusion.library.paths import Found, Refused, gone, look, shown, walk
from diffusion.library.record import REASONS, Record, read_record
from diffusion.library.store.catalog import Catalog, Encoded
from diffusion.library.store.matrix import Matrix, unit_vector
from diffusion.lora_file import Limits, LoraFileError, load_lora
from diffusion.lora_file.container import clean

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
        self.root = root
        self.catalog = catalog
        self.encoder = encoder
        self.limits = limits
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
