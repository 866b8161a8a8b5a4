"""Decoded, resized frames: files that hold them, the cache of a table, the reader of its rows."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from core_gates.errors import GatesError, check_at_least, check_option
from endoscopy.data.frame_table import PATHS, FrameTable
from endoscopy.data.images import DEPTH_UNITS, Frame, read_depth, read_mask, read_rgb, resize_frame
from endoscopy.data.readers.tabular import ReadReport

StoreForm = Literal["raw", "jpeg"]
QUALITY = 95
WAITING, DONE, UNREADABLE = 0, 1, 2


class FrameStore:
    """N slots for frames of (S, S) pixels in a folder, written in any order, once.

    The state of a slot is set last: where writing was interrupted, the slot is still
    waiting.

    Args:
        folder: Where the files are.
        number: N.
        size: S.
        form: ``raw`` or ``jpeg``, of images only.
        masks: Whether there is room for masks.
        depths: Whether there is room for depths.

    Raises:
        ValueError: The form is unknown.
    """

    def __init__(
        self,
        folder: Path,
        number: int,
        size: int,
        form: StoreForm,
        *,
        masks: bool = False,
        depths: bool = False,
    ) -> None:
        check_option("form", form, get_args(StoreForm))
        self.folder, self.number, self.size, self.form = folder, number, size, form
        self.shapes: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {
            "state": ((number,), np.uint8)
        }
        if form == "raw":
            self.shapes["image"] = ((number, size, size, 3), np.uint8)
        else:
            self.shapes["index"] = ((number, 2), np.int64)
        if masks:
            self.shapes["mask"] = ((number, -(-size * size // 8)), np.uint8)
        if depths:
            self.shapes["depth"] = ((number, size, size), np.uint16)
        self._arrays: dict[str, NDArray[Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_arrays": {}}  # another process maps the files itself

    @property
    def state(self) -> NDArray[np.uint8]:
        """(N,) WAITING, DONE or UNREADABLE; written to while building."""
        return self._array("state")

    def nbytes(self, encoded: float = 0.0) -> int:
        """Return the size on disk, given the mean length of an encoded image."""
        fixed = sum(
            int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in self.shapes.values()
        )
        return fixed + (round(self.number * encoded) if self.form == "jpeg" else 0)

    def create(self) -> None:
        """Create the files, or open those of a build that was killed, for writing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, (shape, dtype) in self.shapes.items():
            path = self.folder / f"{name}.npy"
            if not path.exists():
                fresh = path.with_name(f"{name}.new")
                np.lib.format.open_memmap(fresh, mode="w+", dtype=dtype, shape=shape).flush()
                fresh.rename(path)
            self._arrays[name] = np.lib.format.open_memmap(path, mode="r+")
        if self.form == "jpeg":
            written = self._arrays["index"][self.state == DONE].sum(1).max(initial=0)
            with (self.folder / "image.bin").open("ab") as stream:
                stream.truncate(int(written))

    def write(
        self,
        slot: int,
        image: NDArray[np.uint8],
        mask: NDArray[np.uint8] | None,
        depth: NDArray[np.float32] | None,
    ) -> None:
        """Fill a slot."""
        if self.form == "raw":
            self._arrays["image"][slot] = image
        else:
            content = encode(image)
            with (self.folder / "image.bin").open("ab") as stream:
                self._arrays["index"][slot] = stream.seek(0, os.SEEK_END), len(content)
                stream.write(content)
        if mask is not None:
            self._arrays["mask"][slot] = np.packbits(mask)
        if depth is not None:
            self._arrays["depth"][slot] = np.rint(depth * DEPTH_UNITS)
        self.state[slot] = DONE

    def close(self) -> None:
        """Flush and close the files."""
        for array in self._arrays.values():
            if isinstance(array, np.memmap):
                array.flush()
        self._arrays = {}

    def image(self, slot: int) -> NDArray[np.uint8]:
        """Return (S,S,3) uint8."""
        if self.form == "raw":
            return np.array(self._array("image")[slot])
        offset, length = self._array("index")[slot].tolist()
        if "bin" not in self._arrays:
            self._arrays["bin"] = np.memmap(self.folder / "image.bin", dtype=np.uint8, mode="r")
        content = self._arrays["bin"][offset : offset + length]
        return np.array(Image.open(BytesIO(content.tobytes())))

    def mask(self, slot: int) -> NDArray[np.uint8]:
        """Return (S,S) uint8."""
        bits = np.unpackbits(self._array("mask")[slot], count=self.size * self.size)
        return bits.reshape(self.size, self.size)

    def depth(self, slot: int) -> NDArray[np.float32]:
        """Return (S,S) float32 in mm."""
        return self._array("depth")[slot].astype(np.float32) / np.float32(DEPTH_UNITS)

    def _array(self, name: str) -> NDArray[Any]:
        if name not in self._arrays:
            self._arrays[name] = np.load(self.folder / f"{name}.npy", mmap_mode="r")
        return self._arrays[name]


def encode(image: NDArray[np.uint8]) -> bytes:
    """Return an image as JPEG, quality 95, colors at full resolution."""
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    return buffer.getvalue()


class FrameReader:
    """Decode and resize one row at a time.

    Args:
        table: Rows.
        size: Side length in pixels of the result.
        masks: Read masks where the table names them.
        depths: Read depths where the table names them.
    """

    def __init__(
        self, table: FrameTable, size: int, *, masks: bool = False, depths: bool = False
    ) -> None:
        check_at_least(1, size=size)
        self.table, self.size, self.masks, self.depths = table, size, masks, depths
        columns = ["bbox_xmin", "bbox_ymin", "bbox_xmax", "bbox_ymax"]
        sides = table.frames[["width", "height"]].to_numpy(float)
        self.boxes = table.frames[columns].to_numpy(float, copy=True)
        self.boxes[:, 0::2] *= size / sides[:, :1]
        self.boxes[:, 1::2] *= size / sides[:, 1:]

    def box(self, row: int) -> tuple[float, float, float, float]:
        """Return xmin, ymin, xmax, ymax in pixels of the result."""
        xmin, ymin, xmax, ymax = self.boxes[row].tolist()
        return xmin, ymin, xmax, ymax

    def read(self, row: int) -> Frame:
        """Return a frame of (size, size) pixels.

        Raises:
            GatesError: A file is damaged, or a mask or depth has another size than its frame.
        """
        path = self.table.path(row)
        if path is None:
            raise GatesError(f"row {row} of the frame table has no frame_path; prepare it again")
        image = read_rgb(path)
        mask_path = self.table.path(row, "mask_path") if self.masks else None
        depth_path = self.table.path(row, "depth_path") if self.depths else None
        mask = None if mask_path is None else read_mask(mask_path)
        depth = None if depth_path is None else read_depth(depth_path)
        for other, source in ((mask, mask_path), (depth, depth_path)):
            if other is not None and other.shape != image.shape[:2]:
                raise GatesError(
                    f"{source} has {other.shape[1]} x {other.shape[0]} pixels, its frame "
                    f"{image.shape[1]} x {image.shape[0]}; make them equal"
                )
        frame = resize_frame(Frame(image, (0.0, 0.0, 0.0, 0.0), mask, depth), self.size)
        return frame._replace(box=self.box(row))


SAMPLED = 8  # frames whose encoded size is measured


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
            for slot in np.linspace(0, len(self) - 1, min(SAMPLED, len(self))).astype(int):
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
            The unreadable frames; `unreadable_rows` are to be left out of training.

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
        return np.array(
            [row for row, slot in self.slots.items() if state[slot] == UNREADABLE], dtype=np.int64
        )

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
        return FrameStore(
            folder, len(self), self.reader.size, form, masks=self.masks, depths=self.depths
        )

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
            "layout": 1,
            "size": self.reader.size,
            "form": [form, QUALITY],
            "holds": [self.masks, self.depths],
            "files": files,
        }
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
