"""Frames from JPEG and PNG files."""

import io
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, UnidentifiedImageError

from core_gates.errors import GatesError
from endoscopy.data.images import MOST_PIXELS
from endoscopy.inputs.frame import InputReport, SourceFrame
from endoscopy.inputs.image_files import ImageFiles, stem

ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
MASKS = ("_masks", "_depths")  # endings of folders in the layout of prepared data
NAMES = {"L": "grayscale", "P": "palette"}
FAULTS = (SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
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
    names = [name for name in files.names if not _is_label(name)]
    report.kind, report.source, report.expected = "images", Path(path).stem, len(names)
    if not names:
        raise GatesError(
            f"{path}: holds no image; expected files ending in {', '.join(ENDINGS[:3])}"
        )
    for index, name in enumerate(names):
        key = stem(name)
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


def _is_label(name: str) -> bool:
    return any(part.endswith(MASKS) for part in PurePosixPath(name).parts[:-1])


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
    image = _loaded(content)
    if image.mode.startswith("I"):
        gray = (np.asarray(image, dtype=np.uint32) // 257).astype(np.uint8)
        return np.repeat(gray[..., None], 3, axis=2), "16-bit to 8-bit"
    if content.startswith(PNG) and content[PNG_DEPTH] == 16:
        return np.array(image.convert("RGB")), "16-bit to 8-bit"
    conversion = "" if image.mode == "RGB" else f"{NAMES.get(image.mode, image.mode)} to RGB"
    return np.array(image.convert("RGB")), conversion


def _loaded(content: bytes) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(content))
            if image.width * image.height > MOST_PIXELS:
                raise OSError(f"{image.width} x {image.height} pixels are more than any frame has")
            image.load()
            return image
    except UnidentifiedImageError as error:
        raise OSError("is no image") from error
    except FAULTS as error:
        raise OSError(str(error).partition("\n")[0] or "is damaged") from error
