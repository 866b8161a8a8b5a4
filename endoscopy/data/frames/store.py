"""Files that hold frames of one size: pixels or JPEG, packed masks, depths in 1/256 mm."""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from endoscopy.data.images import DEPTH_UNITS
from endoscopy.data.options import check_option

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
        check_option("form", form, StoreForm)
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
            path = self.folder / "image.bin"
            self._arrays["bin"] = np.memmap(path, dtype=np.uint8, mode="r")
        content = self._arrays["bin"][offset : offset + length]
        return np.array(Image.open(BytesIO(content.tobytes())))

    def mask(self, slot: int) -> NDArray[np.uint8]:
        """Return (S,S) uint8."""
        pixels = self.size * self.size
        bits = np.unpackbits(self._array("mask")[slot], count=pixels)
        return bits.reshape(self.size, self.size)

    def depth(self, slot: int) -> NDArray[np.float32]:
        """Return (S,S) float32 in mm."""
        stored: NDArray[np.float32] = self._array("depth")[slot].astype(np.float32)
        return stored / np.float32(DEPTH_UNITS)

    def _array(self, name: str) -> NDArray[Any]:
        if name not in self._arrays:
            self._arrays[name] = np.load(self.folder / f"{name}.npy", mmap_mode="r")
        return self._arrays[name]


def encode(image: NDArray[np.uint8]) -> bytes:
    """Return an image as JPEG, quality 95, colors at full resolution."""
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    return buffer.getvalue()
