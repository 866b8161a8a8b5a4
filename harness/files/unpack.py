"""Downloaded archives, unpacked one after the other, so that no disk holds all of them twice."""

from __future__ import annotations

import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from core_gates.errors import GatesError
from harness.files.download import download, require_space
from harness.files.manifest import RemoteFile

TAR, ZIP = (".tar", ".tar.gz", ".tgz"), (".zip",)
_FAULTS = (OSError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile)


def download_and_unpack(
    files: Iterable[RemoteFile],
    folder: str | os.PathLike[str],
    *,
    tell: Callable[[str], object] = lambda _: None,
    pause: float = 1.0,
) -> Path:
    """Download files, unpack the archives among them, and remove each archive that is unpacked.

    ``.NAME.unpacked`` remembers an archive, so that a later call continues with what is missing.

    Args:
        files: What to get, with checksums.
        folder: Where everything goes.
        tell: Called with a line before each file.
        pause: See :func:`harness.files.download.download`.

    Returns:
        The folder.

    Raises:
        GatesError: The disk is too small, a download fails, or an archive is damaged or unsafe.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = list(files)
    missing = [file for file in files if not _mark(folder, file).exists()]
    require_space(missing, folder)
    for file in missing:
        if not file.name.endswith((*TAR, *ZIP)) and (folder / file.name).exists():
            continue
        tell(f"{files.index(file) + 1} of {len(files)}: {file.name}, {file.size / 1e6:.1f} MB")
        path = download(file, folder, pause=pause)
        if file.name.endswith((*TAR, *ZIP)):
            unpack(path, folder)
            _mark(folder, file).touch()
            path.unlink()
    return folder


def unpack(path: Path, folder: Path) -> None:
    """Unpack a tar or zip archive; entries that would leave the folder are refused.

    Raises:
        GatesError: The archive is damaged, or an entry leads elsewhere.
    """
    try:
        if path.name.endswith(ZIP):
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if name.startswith("/") or ".." in PurePosixPath(name.replace("\\", "/")).parts:
                        raise tarfile.TarError(f"{name!r} would be outside {folder}")
                archive.extractall(folder)
        else:
            with tarfile.open(path) as archive:
                archive.extractall(folder, filter="data")
    except _FAULTS as error:
        what = (str(error).splitlines() or [type(error).__name__])[0]
        raise GatesError(f"{path} cannot be unpacked: {what}; remove it to get it again") from error


def _mark(folder: Path, file: RemoteFile) -> Path:
    return folder / f".{file.name}.unpacked"
