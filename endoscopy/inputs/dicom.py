"""Frames from DICOM: endoscopic images, single or multi-frame, and encapsulated videos."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import FileDataset
from pydicom.encaps import generate_fragments, parse_basic_offsets
from pydicom.errors import InvalidDicomError
from pydicom.pixels import apply_color_lut, pixel_array
from pydicom.uid import UID

from core_gates.errors import GatesError
from endoscopy.inputs.frame import InputReport, SourceFrame
from endoscopy.inputs.image_files import natural_key
from endoscopy.inputs.video import decode_video

IMAGE_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.77.1.1",  # VL Endoscopic Image
    "1.2.840.10008.5.1.4.1.1.77.1.1.1",  # Video Endoscopic Image
    "1.2.840.10008.5.1.4.1.1.77.1.4",  # VL Photographic Image
    "1.2.840.10008.5.1.4.1.1.77.1.4.1",  # Video Photographic Image
    "1.2.840.10008.5.1.4.1.1.7",  # Secondary Capture, used by many frame grabbers
    "1.2.840.10008.5.1.4.1.1.7.2",  # Multi-frame Grayscale Byte Secondary Capture
    "1.2.840.10008.5.1.4.1.1.7.4",  # Multi-frame True Color Secondary Capture
}
VIDEO_SYNTAXES = {f"1.2.840.10008.1.2.4.{number}" for number in range(100, 109)}  # MPEG-2 to HEVC
VIDEO_SYNTAXES |= {f"{syntax}.1" for syntax in VIDEO_SYNTAXES}  # fragmentable
PREFIX = b"DICM"  # after 128 bytes


def is_dicom(path: Path) -> bool:
    """Return whether a file carries the DICOM prefix."""
    with path.open("rb") as file:
        file.seek(128)
        return file.read(4) == PREFIX


def read_dicom(
    path: str | Path, report: InputReport, max_unreadable: float = 0.01
) -> Iterator[SourceFrame]:
    """Yield the frames of a DICOM file, or of the files of a folder by instance number.

    The key of a frame is the SOP instance UID; frames of a multi-frame instance append ``#`` and
    the DICOM frame number, from 1. Nothing else of the header is passed on.

    Args:
        path: File or folder.
        report: Filled while frames are read; its source is the (first) instance UID.
        max_unreadable: Fraction of frames that may be unreadable; they are counted and skipped.

    Raises:
        GatesError: A file is not DICOM, not an endoscopic image, or without pixels; or too much
            is damaged.
    """
    headers = dicom_headers(path)
    report.kind = "dicom"
    report.source = str(headers[0][1].SOPInstanceUID)
    report.expected = sum(_num_frames(header) for _, header in headers)
    index = 0
    for file, header in headers:
        uid = str(header.SOPInstanceUID)
        count = _num_frames(header)
        for number, image in _images(file, header, report, max_unreadable):
            report.read += 1
            key = uid if count == 1 else f"{uid}#{number + 1}"
            yield SourceFrame(image, key, index + number, number)
        index += count
    report.finish(max_unreadable)


def dicom_headers(path: str | Path) -> list[tuple[Path, FileDataset]]:
    """Return the files of a source and their headers without pixels, in the order of reading.

    Raises:
        GatesError: A file is not DICOM or not an endoscopic image.
    """
    return sorted(map(_header, _files(Path(path))), key=_place)


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise GatesError(f"{path}: does not exist; check the path")
    if path.is_file():
        return [path]
    files = [file for file in path.rglob("*") if file.is_file() and is_dicom(file)]
    return sorted(files, key=lambda file: natural_key(file.as_posix()))


def _header(path: Path) -> tuple[Path, FileDataset]:
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True)
    except (InvalidDicomError, OSError, EOFError, ValueError) as error:
        raise GatesError(f"{path}: cannot be read as DICOM: {_first_line(error)}") from error
    needed = ("SOPClassUID", "SOPInstanceUID")
    missing = [name for name in needed if name not in header]
    if missing:
        raise GatesError(f"{path}: lacks {', '.join(missing)}; export it again")
    if header.SOPClassUID not in IMAGE_CLASSES:
        raise GatesError(
            f"{path}: is {UID(header.SOPClassUID).name}, expected an endoscopic image or video"
        )
    if "TransferSyntaxUID" not in header.file_meta:
        raise GatesError(f"{path}: names no transfer syntax; export it again")
    return path, header


def _place(item: tuple[Path, FileDataset]) -> tuple[str, int]:
    """Order by series, then by instance number; files without one keep their order of names."""
    header = item[1]
    number = header.get("InstanceNumber")
    return str(header.get("SeriesInstanceUID", "")), int(number) if number is not None else 0


def _num_frames(header: FileDataset) -> int:
    return int(header.get("NumberOfFrames") or 1)


def _images(
    path: Path, header: FileDataset, report: InputReport, max_unreadable: float
) -> Iterator[tuple[int, np.ndarray]]:
    dataset = pydicom.dcmread(path)
    if "PixelData" not in dataset or not dataset.PixelData:
        raise GatesError(
            f"{path}: holds no pixels ({UID(header.SOPClassUID).name}); export it with its images"
        )
    if dataset.file_meta.TransferSyntaxUID in VIDEO_SYNTAXES:
        video = io.BytesIO(dataset.PixelData)
        parse_basic_offsets(video)  # leaves the position at the first fragment
        content = io.BytesIO(b"".join(generate_fragments(video)))
        yield from enumerate(decode_video(content, str(path), report, max_unreadable))
        return
    uid = str(dataset.SOPInstanceUID)
    for number in range(_num_frames(dataset)):
        try:
            pixels = pixel_array(dataset, index=number)
            image = _eight_bit_rgb(pixels, dataset, report)
        except Exception as error:  # decoders raise errors of many types
            report.skip(f"{uid}#{number + 1}", _first_line(error), max_unreadable)
            continue
        yield number, image


def _eight_bit_rgb(pixels: np.ndarray, dataset: FileDataset, report: InputReport) -> np.ndarray:
    """Return (H, W, 3) uint8; pydicom has turned YBR into RGB already."""
    kind = dataset.PhotometricInterpretation
    bits = dataset.BitsStored
    if kind == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, dataset)
        bits = 8 * pixels.itemsize
        report.converted["palette to RGB"] += 1
    if dataset.PixelRepresentation:
        raise ValueError("signed pixels are not supported")
    if bits > 8:
        pixels = pixels >> (bits - 8)
        report.converted[f"{bits}-bit to 8-bit"] += 1
    if kind.startswith("MONOCHROME"):
        if kind == "MONOCHROME1":
            pixels = (1 << min(bits, 8)) - 1 - pixels
        pixels = np.repeat(pixels[..., None], 3, axis=2)
        report.converted["grayscale to RGB"] += 1
    return np.ascontiguousarray(pixels[..., :3].astype(np.uint8))


def _first_line(error: BaseException) -> str:
    """Return what happened, without pydicom's advice for programmers."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line.partition(". ")[0].partition(" - ")[0][:120]
