"""A cache of decoded, resized frames, so that training reads pixels instead of JPEG files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from core_gates.errors import GatesError
from endoscopy.data.frames.reader import FrameReader
from endoscopy.data.frames.store import (
    DONE,
    QUALITY,
    UNREADABLE,
    WAITING,
    FrameStore,
    StoreForm,
    encode,
)
from endoscopy.data.frames.transforms import Frame
from endoscopy.data.readers.report import ReadReport

SAMPLED = 8
PATHS = ("frame_path", "mask_path", "depth_path")
_LAYOUT = 1


class FrameCache:
    """Frames of some rows at the size of a reader, in memory-mapped files.

    The folder's name is a hash of paths, lengths and modification times of all source files and
    of the storage format: a changed source gets another cache, and equal rows find the existing
    one. A build that was killed continues where it stopped; one process builds, any number may
    read.

    Args:
        reader: Where frames come from, and their size.
        rows: Rows to hold, such as ``sampler.drawable(epochs)``; lesions of one frame share it.
        folder: Parent of the cache.
        form: ``raw`` for uint8 pixels, exact and fastest; ``jpeg`` for quality 95 at a fraction of
            the size, whose pixels are not exact. Masks and depths are always exact.

    Raises:
        ValueError: The form is unknown.
    """

    def __init__(
        self,
        reader: FrameReader,
        rows: Iterable[int],
        folder: str | os.PathLike[str],
        form: StoreForm = "raw",
    ) -> None:
        self.reader = reader
        self.slots: dict[int, int] = {}
        self.owners: list[int] = []  # one row for each slot
        first: dict[tuple[Path | None, ...], int] = {}
        for row in sorted({int(row) for row in rows}):
            slot = first.setdefault(self._paths(row), len(self.owners))
            if slot == len(self.owners):
                self.owners.append(row)
            self.slots[row] = slot
        holds = [any(paths[column] for paths in first) for column in (1, 2)]
        self.masks, self.depths = reader.masks and holds[0], reader.depths and holds[1]
        key = self._key(first, form)
        self.folder = Path(folder) / f"frames-{key}"
        self.store = self._store(self.folder, form)
        self._building = self._store(self.folder.with_name(f".frames-{key}.partial"), form)

    def __len__(self) -> int:
        return len(self.owners)

    def __contains__(self, row: int) -> bool:
        return row in self.slots

    def planned_bytes(self) -> int:
        """Return the size on disk, exact for ``raw``, from a sample of frames for ``jpeg``."""
        lengths = []
        if self.store.form == "jpeg":
            sample = np.linspace(0, len(self) - 1, min(SAMPLED, len(self))).astype(int)
            for slot in sample:
                try:
                    lengths.append(len(encode(self.reader.read(self.owners[slot]).image)))
                except GatesError:
                    continue  # the build reports it
        return self.store.nbytes(float(np.mean(lengths)) if lengths else 0.0)

    def summary(self) -> str:
        """Return the numbers of frames and megabytes, in a line."""
        return f"cache of {len(self)} frames: {self.planned_bytes() / 1e6:.1f} MB"

    def is_complete(self) -> bool:
        """Return whether the cache is built."""
        return self.folder.is_dir()

    def build(self, progress: Callable[[int, int], None] | None = None) -> ReadReport:
        """Fill the cache, or continue filling it.

        Args:
            progress: Called after each frame with the number done and the total.

        Returns:
            The unreadable frames; :meth:`unreadable_rows` are to be left out of training.

        Raises:
            GatesError: There is not enough space on the disk, or more than 1 % of the frames cannot
                be read.
        """
        if self.is_complete():
            return self._report(self.store)
        self._require_space()
        store = self._building
        store.create()
        for slot, row in enumerate(self.owners):
            if store.state[slot] == WAITING:
                try:
                    frame = self.reader.read(row)
                    store.write(slot, frame.image, frame.mask, frame.depth)
                except GatesError:
                    store.state[slot] = UNREADABLE
            if progress is not None:
                progress(slot + 1, len(self))
        report = self._report(store)
        store.close()
        try:
            report.require_readable()
        except GatesError:
            shutil.rmtree(store.folder)
            raise
        store.folder.rename(self.folder)
        return report

    def unreadable_rows(self) -> NDArray[np.int64]:
        """Return the rows whose frame could not be read."""
        state = self.store.state
        rows = [row for row, slot in self.slots.items() if state[slot] == UNREADABLE]
        return np.array(rows, dtype=np.int64)

    def read(self, row: int) -> Frame:
        """Return a frame as ``reader.read`` does.

        Raises:
            KeyError: The cache does not hold the row.
            GatesError: The cache is not built, or the frame was unreadable.
        """
        slot = self.slots[row]
        if not self.is_complete():
            raise GatesError(f"{self.folder} is not built; build the cache first")
        if self.store.state[slot] != DONE:
            raise GatesError(f"{self.reader.table.path(row)} cannot be read; leave row {row} out")
        _, mask, depth = self._paths(row)
        return Frame(
            self.store.image(slot),
            self.reader.box(row),
            self.store.mask(slot) if self.masks and mask else None,
            self.store.depth(slot) if self.depths and depth else None,
        )

    def _store(self, folder: Path, form: StoreForm) -> FrameStore:
        size = self.reader.size
        return FrameStore(folder, len(self), size, form, masks=self.masks, depths=self.depths)

    def _paths(self, row: int) -> tuple[Path | None, ...]:
        return tuple(self.reader.table.path(row, column) for column in PATHS)

    def _report(self, store: FrameStore) -> ReadReport:
        report = ReadReport(str(self.folder), found=len(self.slots), files=len(self))
        rows = np.bincount(list(self.slots.values()), minlength=len(self))
        for slot in np.flatnonzero(store.state == UNREADABLE):
            path = self.reader.table.path(self.owners[slot])
            report.skip_unreadable(path, "image cannot be decoded", int(rows[slot]))
        return report

    def _require_space(self) -> None:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        needed, free = self.planned_bytes(), shutil.disk_usage(self.folder.parent).free
        if needed > free:
            raise GatesError(
                f"a cache of {len(self)} frames needs {needed / 1e9:.1f} GB, "
                f"{self.folder.parent} has {free / 1e9:.1f} GB; use form jpeg, fewer frames per "
                "object, a smaller size or another folder"
            )

    def _key(self, sources: Iterable[tuple[Path | None, ...]], form: StoreForm) -> str:
        files: list[tuple[str, int, int]] = []
        for path in [path for paths in sources for path in paths if path is not None]:
            try:
                status = path.stat()
                files.append((str(path), status.st_size, status.st_mtime_ns))
            except OSError:
                files.append((str(path), -1, 0))
        content = {
            "layout": _LAYOUT,
            "size": self.reader.size,
            "form": [form, QUALITY],
            "holds": [self.masks, self.depths],
            "files": files,
        }
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
