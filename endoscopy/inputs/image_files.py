"""Named files of a folder, of a zip archive, or a single file, in natural order."""

import re
import zipfile
from pathlib import Path, PurePosixPath

from core_gates.errors import GatesError

ZIP = b"PK\x03\x04"
MAX_BYTES = 512 * 2**20  # more than any frame needs; a guard against decompression bombs


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key under which ``a_2`` comes before ``a_10``."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts if p]


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
            found = [p.relative_to(self.path) for p in self.path.rglob("*") if p.is_file()]
            names = [p.as_posix() for p in found]
        elif self._archive is not None:
            names = [info.filename for info in self._archive.infolist() if not info.is_dir()]
        else:
            self.names = [self.path.name]
            return
        kept = (name for name in names if not _is_hidden(name) and _ends(name, endings))
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


def stem(name: str) -> str:
    """Return a name without its ending, with its folders."""
    return PurePosixPath(name).with_suffix("").as_posix()


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)


def _ends(name: str, endings: tuple[str, ...]) -> bool:
    return not endings or PurePosixPath(name).suffix.lower() in endings
