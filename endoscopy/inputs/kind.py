"""The kind of a source, detected from its content, and its frames."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from core_gates.errors import GatesError
from endoscopy.inputs.dicom import is_dicom, read_dicom
from endoscopy.inputs.folder import ENDINGS, read_folder
from endoscopy.inputs.frame import InputReport, SourceFrame
from endoscopy.inputs.video import read_video

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
        report: Filled while frames are read, see :class:`InputReport`.
        max_unreadable: Fraction of frames that may be unreadable; they are counted and skipped.

    Raises:
        GatesError: In one line, if the source cannot be read.
    """
    if not 0 <= max_unreadable <= 1:
        raise GatesError(f"max_unreadable is {max_unreadable}, expected a fraction from 0 to 1")
    reader = READERS[source_kind(source)]
    return reader(source, InputReport() if report is None else report, max_unreadable)


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
