"""Frames from image files of a folder, of a zip archive, or a single one, in natural order."""

import io
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, UnidentifiedImageError

from core_gates.errors import GatesError
from endoscopy.data.images import FAULTS, MOST_PIXELS, natural_key, rgb_of


@dataclass(frozen=True)
class SourceFrame:
    """A decoded frame.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        key: Stable name: the file name (with its folders below the source), without its ending
            unless only endings differ, the name of the video and the frame number, or the DICOM
            instance UID.
        index: Position in the source, from 0, counting unreadable frames too.
        number: Frame number in a video or a DICOM instance, from 0; 0 for single images.
    """

    image: np.ndarray
    key: str
    index: int
    number: int = 0


@dataclass
class InputReport:
    """Counts of a source, complete once all frames were read.

    Attributes:
        source: Name of the source, without patient data: the stem of its path, or a UID.
        kind: ``images``, ``video`` or ``dicom``.
        expected: Number of frames that the source states, if it does.
        read: Frames that were decoded.
        unreadable: (key, reason) of every frame that was skipped.
        converted: Number of frames by conversion, such as "16-bit to 8-bit".
    """

    source: str = ""
    kind: str = ""
    expected: int | None = None
    read: int = 0
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    converted: Counter[str] = field(default_factory=Counter)

    def skip(self, key: str, reason: str, max_unreadable: float) -> None:
        """Count a frame that cannot be read.

        Raises:
            GatesError: More than the fraction ``max_unreadable`` of the expected frames is skipped.
        """
        self.unreadable.append((key, reason))
        if self.expected is not None and len(self.unreadable) > max_unreadable * self.expected:
            self._refuse(self.expected, max_unreadable)

    def finish(self, max_unreadable: float) -> None:
        """Check the counts once all frames were read.

        Raises:
            GatesError: Nothing was read, or too many frames were skipped.
        """
        total = self.read + len(self.unreadable)
        if len(self.unreadable) > max_unreadable * total:
            self._refuse(total, max_unreadable)
        if not self.read:
            raise GatesError(f"{self.source}: holds no frame; name a source with at least one")

    def lines(self) -> list[str]:
        """Return remarks on the data set for its user, one a line."""
        lines = [f"{self.source}: {self.read} frames read ({self.kind})"]
        lines += [f"{count} frames: {name}" for name, count in sorted(self.converted.items())]
        lines += [f"skipped {key}: {reason}" for key, reason in self.unreadable]
        return lines

    def _refuse(self, total: int, max_unreadable: float) -> None:
        key, reason = self.unreadable[0]
        raise GatesError(
            f"{self.source}: {len(self.unreadable)} of {total} frames cannot be read, at most "
            f"{100 * max_unreadable:g} % may (first {key}: {reason}); repair or remove them, or "
            "raise max_unreadable"
        )


LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
BLACK = 10  # of 255; no brighter luma counts as border
DARK = 1 / 8  # of the brightest luma; color that bleeds into padding stays below
SPARSE = 1 / 50  # of the lit pixels of the fullest row; light that bleeds into padding stays below
UNIFORM = 24  # of 255; bound on how lossy coding changes padding of one color
OUTLIERS = 0.1  # fraction of padding that ringing at its edge may disturb


def stated_part(image: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, tuple[int, int]]:
    """Crop padding at the right and at the bottom, or all around, if the frame is padded.

    A frame that is larger than stated was either padded or enlarged. It was padded if everything
    beyond the stated size has one color, or is a single row or column, as in frames made even for
    video: lossy colors bleed into it.

    Args:
        image: (H, W, 3) uint8.
        size: Stated width and height.

    Returns:
        The frame, cropped to the stated size if it is padded, else unchanged, and the offset (x,
        y).
    """
    width, height = size
    spare_x, spare_y = image.shape[1] - width, image.shape[0] - height
    if min(spare_x, spare_y) < 0 or max(spare_x, spare_y) == 0:
        return image, (0, 0)
    if max(spare_x, spare_y) == 1:
        return image[:height, :width], (0, 0)
    half = spare_x // 2, spare_y // 2
    for left, top in ((0, 0), half, (half[0] // 2 * 2, half[1] // 2 * 2)):
        part = (slice(top, top + height), slice(left, left + width))
        outside = np.ones(image.shape[:2], dtype=bool)
        outside[part] = False
        padding = image[outside].astype(np.int16)
        deviation = np.abs(padding - np.median(padding, axis=0)).max(axis=1)
        if (deviation > UNIFORM).mean() <= OUTLIERS:
            return image[part], (left, top)
    return image, (0, 0)


def trim_black(image: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """Crop dark rows and columns at the four sides.

    A pixel is dark if its luma is at most an eighth of the largest one, or at most 10;
    a row is dark if it has at most a fiftieth of the bright pixels of the fullest row. Hence
    lossy coding, which lets color and some light bleed into a black border, moves no edge, a frame
    and the same frame padded with black give the same result, and video black (16) is black.

    Args:
        image: (H, W, 3) uint8.

    Returns:
        The part within, and its offset (x, y). A frame that is dark throughout is unchanged.
    """
    luma = image @ LUMA
    lit = luma > max(BLACK, DARK * luma.max())
    if not lit.any():
        return image, (0, 0)
    top, bottom = _ends(lit.sum(axis=1))
    left, right = _ends(lit.sum(axis=0))
    return image[top:bottom, left:right], (left, top)


def _ends(counts: np.ndarray) -> tuple[int, int]:
    """Return the first and the last place, exclusive, that is well filled."""
    filled = np.flatnonzero(counts > SPARSE * counts.max())
    return int(filled[0]), int(filled[-1]) + 1


ZIP = b"PK\x03\x04"
MAX_BYTES = 512 * 2**20  # more than any frame needs; a guard against decompression bombs


class ImageFiles:
    """Files below a folder or in a zip archive, or one file.

    Args:
        path: Folder (searched to any depth), zip archive or file.
        endings: Endings to keep, lower case, such as ``(".png",)``; empty keeps all. A single file
            is always kept.

    Attributes:
        names: Names below the source with ``/``, in natural order.

    Raises:
        GatesError: The path does not exist, or is a damaged zip archive.
    """

    def __init__(self, path: str | Path, endings: tuple[str, ...] = ()) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise GatesError(f"{self.path}: does not exist; check the path")
        self._archive = _archive(self.path)
        if self.path.is_dir():
            paths = [p.relative_to(self.path) for p in self.path.rglob("*") if p.is_file()]
            names = [p.as_posix() for p in paths]
        elif self._archive is not None:
            names = [info.filename for info in self._archive.infolist() if not info.is_dir()]
        else:
            self.names = [self.path.name]
            return
        kept = (
            name
            for name in names
            if not any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)
            and (not endings or PurePosixPath(name).suffix.lower() in endings)
        )
        self.names = sorted(kept, key=natural_key)

    def read(self, name: str) -> bytes:
        """Return the content of a file.

        Raises:
            OSError: It cannot be read, or is larger than 512 MiB.
        """
        if self._archive is None:
            file = self.path / name if self.path.is_dir() else self.path
            return file.read_bytes()
        if self._archive.getinfo(name).file_size > MAX_BYTES:
            raise OSError("larger than 512 MiB")
        try:
            return self._archive.read(name)
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError) as error:
            raise OSError(str(error)) from error


def _archive(path: Path) -> zipfile.ZipFile | None:
    """Open a zip archive; None if the path is not one."""
    if path.is_dir():
        return None
    with path.open("rb") as file:
        head = file.read(len(ZIP))
    if head != ZIP and not zipfile.is_zipfile(path):
        return None
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise GatesError(
            f"{path}: is a damaged or truncated zip archive ({error}); copy it again"
        ) from error


ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def stem(name: str) -> str:
    """Return a name, with its folders, without the ending of an image or of DICOM."""
    path = PurePosixPath(name)
    known = path.suffix.lower() in (*ENDINGS, ".dcm")
    return path.with_suffix("").as_posix() if known else name


def keys_of(names: Iterable[str]) -> dict[str, str]:
    """Return each name without its ending; names that would then be equal keep theirs."""
    different = dict.fromkeys(names)
    count = Counter([*different, *map(stem, different)])
    return {name: name if count[stem(name)] > 1 else stem(name) for name in different}


MASKS = ("_masks", "_depths")  # endings of folders in the layout of prepared data
NAMES = {"L": "grayscale", "P": "palette"}
PNG, PNG_DEPTH = b"\x89PNG", 24  # byte with the bits per channel


def read_folder(
    path: str | Path, report: InputReport, max_unreadable: float = 0.01
) -> Iterator[SourceFrame]:
    """Yield the images of a folder (to any depth), a zip archive or one file, in natural order.

    Args:
        path: Where they lie.
        report: Filled while frames are read.
        max_unreadable: Fraction of files that may be unreadable; they are counted and skipped.

    Raises:
        GatesError: There is no image, or too many are unreadable.
    """
    files = ImageFiles(path, ENDINGS)
    keys = keys_of(
        name
        for name in files.names
        if not any(part.endswith(MASKS) for part in PurePosixPath(name).parts[:-1])
    )
    report.kind, report.source, report.expected = "images", Path(path).stem, len(keys)
    if not keys:
        raise GatesError(
            f"{path}: holds no image; expected files ending in {', '.join(ENDINGS[:3])}"
        )
    for index, (name, key) in enumerate(keys.items()):
        try:
            image, conversion = decode_image(files.read(name))
        except OSError as error:
            report.skip(key, str(error), max_unreadable)
            continue
        if conversion:
            report.converted[conversion] += 1
        report.read += 1
        yield SourceFrame(image, key, index)
    report.finish(max_unreadable)


def decode_image(content: bytes) -> tuple[np.ndarray, str]:
    """Decode a JPEG or PNG.

    16 bits are scaled to 8, gray becomes three equal channels, transparency is ignored.

    Args:
        content: The file.

    Returns:
        The image (H, W, 3) uint8, RGB, and the conversion that it took, empty if none.

    Raises:
        OSError: It is not an image, is truncated, or has more pixels than any frame.
    """
    if not content:
        raise OSError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(content))
            if image.width * image.height > MOST_PIXELS:
                raise OSError(f"{image.width} x {image.height} pixels are more than any frame has")
            image.load()
    except UnidentifiedImageError as error:
        raise OSError("is no image") from error
    except FAULTS as error:
        raise OSError(str(error).partition("\n")[0] or "is damaged") from error
    deep = image.mode.startswith("I") or (content.startswith(PNG) and content[PNG_DEPTH] == 16)
    named = "" if image.mode == "RGB" else f"{NAMES.get(image.mode, image.mode)} to RGB"
    return rgb_of(image), "16-bit to 8-bit" if deep else named
