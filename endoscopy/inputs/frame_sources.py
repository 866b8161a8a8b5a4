"""Frames of DICOM files and videos, and the kind of a source, detected from its content."""

import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import av
import numpy as np
import pydicom
from av.error import FFmpegError
from av.video.frame import VideoFrame
from pydicom.dataset import FileDataset
from pydicom.encaps import generate_fragments, parse_basic_offsets
from pydicom.errors import InvalidDicomError
from pydicom.pixels import apply_color_lut, pixel_array
from pydicom.uid import UID

from core_gates.errors import GatesError
from endoscopy.data.images import natural_key
from endoscopy.inputs.image_files import ENDINGS, InputReport, SourceFrame, read_folder


def read_video(
    path: str | Path, report: InputReport, max_unreadable: float = 0.01
) -> Iterator[SourceFrame]:
    """Yield the frames of the first video stream of a file, keys ``{name}_{number:06d}``.

    Frames stored as RGB come out bit for bit; others are converted with the matrix that the file
    names (BT.601 if it names none).

    Args:
        path: Any container that FFmpeg reads.
        report: Filled while frames are read.
        max_unreadable: Fraction of packets that may be damaged; they are counted and skipped.

    Raises:
        GatesError: The file is empty, not a video, or damaged beyond ``max_unreadable``.
    """
    path = Path(path)
    if not path.exists():
        raise GatesError(f"{path}: does not exist; check the path")
    if path.stat().st_size == 0:
        raise GatesError(f"{path}: is empty (0 bytes), expected a video; copy it again")
    report.kind, report.source = "video", path.stem
    with path.open("rb") as file:
        for number, image in enumerate(decode_video(file, str(path), report, max_unreadable)):
            report.read += 1
            yield SourceFrame(image, f"{path.stem}_{number:06d}", number, number)
    report.finish(max_unreadable)


def decode_video(
    file: io.BufferedIOBase, name: str, report: InputReport, max_unreadable: float
) -> Iterator[np.ndarray]:
    """Yield the frames (H, W, 3) uint8, RGB, of an open video.

    Raises:
        GatesError: It is not a video; ``name`` is for the message.
    """
    try:
        container = av.open(file, "r")
    except FFmpegError as error:
        raise GatesError(
            f"{name}: cannot be opened as a video ({error.strerror}); it may be cut off, copy it "
            "again or remux it with ffmpeg"
        ) from error
    with container:
        if not container.streams.video:
            raise GatesError(f"{name}: holds no video stream; name a file with a video stream")
        stream = container.streams.video[0]
        report.expected = report.expected or stream.frames or None
        for packet in container.demux(stream):
            try:
                decoded = stream.decode(packet)
            except FFmpegError as error:
                report.skip(f"packet at {packet.pts}", error.strerror or "damaged", max_unreadable)
                continue
            for frame in decoded:
                assert isinstance(frame, VideoFrame)
                if frame.is_corrupt:
                    report.skip(f"frame at {frame.pts}", "damaged", max_unreadable)
                else:
                    yield frame.to_ndarray(format="rgb24")


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
    report.kind, report.source = "dicom", str(headers[0][1].SOPInstanceUID)
    report.expected = sum(_num_frames(header) for _, header in headers)
    index = 0
    for file, header in headers:
        uid, count = str(header.SOPInstanceUID), _num_frames(header)
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
    if missing := [name for name in ("SOPClassUID", "SOPInstanceUID") if name not in header]:
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
            image = _eight_bit_rgb(pixel_array(dataset, index=number), dataset, report)
        except Exception as error:  # decoders raise errors of many types
            report.skip(f"{uid}#{number + 1}", _first_line(error), max_unreadable)
            continue
        yield number, image


def _eight_bit_rgb(pixels: np.ndarray, dataset: FileDataset, report: InputReport) -> np.ndarray:
    """Return (H, W, 3) uint8; pydicom has turned YBR into RGB already."""
    kind, bits = dataset.PhotometricInterpretation, dataset.BitsStored
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


Kind = Literal["images", "video", "dicom"]
IMAGE_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\x00", b"MM\x00*", b"PK\x03\x04")
DICOM_ENDINGS = (".dcm", ".dicom")
READERS = {"images": read_folder, "video": read_video, "dicom": read_dicom}
MAX_PEEKED = 1000  # files of a folder whose first bytes are read


def frames(
    source: str | Path, report: InputReport | None = None, *, max_unreadable: float = 0.01
) -> Iterator[SourceFrame]:
    """Yield the frames of a folder or zip archive of images, an image, a video, or DICOM.

    Args:
        source: Path.
        report: Filled while frames are read, see `InputReport`.
        max_unreadable: Fraction of frames that may be unreadable; they are counted and skipped.

    Raises:
        GatesError: In one line, if the source cannot be read.
    """
    if not 0 <= max_unreadable <= 1:
        raise GatesError(f"max_unreadable is {max_unreadable}, expected a fraction from 0 to 1")
    report = InputReport() if report is None else report
    return READERS[source_kind(source)](source, report, max_unreadable)


def source_kind(source: str | Path) -> Kind:
    """Distinguish images, a video and DICOM by their first bytes.

    Raises:
        GatesError: The source does not exist, is empty, or is text.
    """
    path = Path(source)
    if not path.exists():
        raise GatesError(f"{path}: does not exist; check the path")
    if path.is_dir():
        return _folder_kind(path)
    if path.stat().st_size == 0:
        raise GatesError(f"{path}: is empty (0 bytes), expected frames; copy it again")
    if is_dicom(path):
        return "dicom"
    with path.open("rb") as file:
        head = file.read(16)
    if path.suffix.lower() in DICOM_ENDINGS and not head.startswith(IMAGE_MAGIC):
        raise GatesError(f"{path}: is named like DICOM and holds none; export it again")
    if _is_text(path):
        raise GatesError(f"{path}: holds text, expected images, a video or DICOM; name those")
    is_webp = head.startswith(b"RIFF") and head[8:12] == b"WEBP"
    return "images" if is_webp or head.startswith(IMAGE_MAGIC) else "video"


def _is_text(path: Path) -> bool:
    """Whether the first bytes are printable, unlike those of images and videos."""
    with path.open("rb") as file:
        head = file.read(512)
    try:
        text = head.decode("utf-8", errors="strict" if len(head) < 512 else "ignore")
    except UnicodeDecodeError:
        return False
    return all(letter.isprintable() or letter.isspace() for letter in text)


def _folder_kind(path: Path) -> Kind:
    files = (file for file in path.rglob("*") if file.is_file())
    for file in itertools.islice(files, MAX_PEEKED):
        if file.suffix.lower() in ENDINGS:
            return "images"
        if is_dicom(file):
            return "dicom"
    raise GatesError(
        f"{path}: holds no image and no DICOM file; expected JPEG, PNG or DICOM (a video is named "
        "by its file)"
    )
