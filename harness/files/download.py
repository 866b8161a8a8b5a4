"""Downloaded archives, unpacked one after the other, so that no disk holds all of them twice."""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from core_gates.errors import GatesError
from harness.files.digest import RemoteFile, require_http, total_bytes

BLOCK = 2**20
Progress = Callable[[str, int, int], None]
_TRANSIENT = (OSError, http.client.HTTPException)
_FINAL = frozenset({400, 401, 403, 404, 405, 410, 451})


def require_space(files: Iterable[RemoteFile], folder: Path) -> None:
    """Refuse a download of what is missing that the disk cannot hold.

    Raises:
        GatesError: The disk is too small.
    """
    files = list(files)
    needed = total_bytes(f for f in files if not (folder / f.name).exists())
    needed -= sum(p.stat().st_size for f in files if (p := partial_path(folder, f)).exists())
    if needed > (free := shutil.disk_usage(folder).free):
        raise GatesError(
            f"{folder} has {free / 1e9:.1f} GB free and the files need {needed / 1e9:.1f} GB; "
            "choose another folder or fewer files"
        )


def download(
    file: RemoteFile,
    folder: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
    retries: int = 5,
    pause: float = 1.0,
    timeout: float = 30.0,
) -> Path:
    """Download a file, or continue after an interruption.

    Bytes go to ``.NAME.partial`` next to the target, which a later call continues by an HTTP range;
    a server that ignores ranges sends the whole file again. The whole file is hashed before it is
    renamed. A wrong checksum discards all bytes, since the wrong ones cannot be found, and starts
    over once.

    Args:
        file: What to get, with its checksum.
        folder: Where it goes.
        progress: Told the name, bytes there and bytes in all (-1 if unknown) after each block.
        retries: Attempts after a broken connection or a busy server that bring nothing new.
        pause: Seconds before the first of them, doubled each time.
        timeout: Seconds without a byte that count as a broken connection.

    Returns:
        The path. A file already there is taken as verified if its size is right.

    Raises:
        GatesError: The server refuses, keeps failing, or the checksum is wrong twice.
    """
    target = Path(folder) / file.name
    if target.exists():
        if file.size in (-1, target.stat().st_size):
            return target
        raise GatesError(
            f"{target} has {target.stat().st_size} bytes, expected {file.size}; remove it"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(target.parent, file)
    for attempt in range(2):
        _fetch(file, partial, progress, retries, pause, timeout)
        digest = checksum(partial, file.algorithm)
        if digest == file.digest:
            partial.replace(target)
            return target
        partial.unlink()
        if attempt == 1:
            break
    raise GatesError(
        f"{file.url} has {file.algorithm} {digest}, expected {file.digest}, twice; its source or "
        "the manifest changed, get a new manifest"
    )


def checksum(path: Path, algorithm: str) -> str:
    """Return the hexadecimal digest of a file."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, lambda: hashlib.new(algorithm, usedforsecurity=False))
    return digest.hexdigest()


def partial_path(folder: Path, file: RemoteFile) -> Path:
    """Return where the bytes of a file are kept until all are there."""
    return folder / f".{file.name}.partial"


def _fetch(
    file: RemoteFile,
    partial: Path,
    progress: Progress | None,
    retries: int,
    pause: float,
    timeout: float,
) -> None:
    """Bring the partial file to its full length; attempts that gain nothing are counted."""
    failures = 0
    while not _is_full(file, partial):
        before = _length(partial)
        try:
            if _receive(file, partial, progress, timeout) or _is_full(file, partial):
                return
            problem = "the connection broke"
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416 and before:  # the rest that was asked for does not exist
                if file.size == -1:
                    return
                partial.unlink()
            elif error.code in _FINAL:
                raise GatesError(
                    f"{file.url} answers {error.code} {error.reason}; check the manifest and access"
                ) from error
            problem = f"the server answers {error.code}"
        except _TRANSIENT as error:
            problem = str(getattr(error, "reason", None) or error) or type(error).__name__
        failures = 0 if _length(partial) > before else failures + 1
        if failures > retries:
            raise GatesError(
                f"{file.url} stopped at {_length(partial)} of {file.size} bytes ({problem}), after "
                f"{failures} attempts; run the same command later to continue"
            )
        time.sleep(pause * 2 ** max(0, failures - 1))


def _receive(file: RemoteFile, partial: Path, progress: Progress | None, timeout: float) -> bool:
    """Append what the server sends; True if it sent all that it announced."""
    have = _length(partial)
    request = urllib.request.Request(
        require_http(file.url), headers={"Accept-Encoding": "identity"}
    )
    if have:
        request.add_header("Range", f"bytes={have}-")
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        continued = answer.status == 206 and _range_start(answer) == have
        if have and answer.status == 206 and not continued:
            partial.unlink()
            return False
        announced = int(answer.headers.get("Content-Length", -1))
        received = 0
        with partial.open("ab" if continued else "wb") as stream:
            there = have if continued else 0
            while block := answer.read1(BLOCK):
                stream.write(block)
                received += len(block)
                if file.size != -1 and there + received > file.size:
                    raise GatesError(
                        f"{file.url} sends more than {file.size} bytes; get a new manifest"
                    )
                if progress is not None:
                    progress(file.name, there + received, file.size)
    return file.size == -1 and announced in (-1, received)


def _range_start(answer: Any) -> int:
    """Return the first byte of ``Content-Range: bytes 5-9/10``; -1 if there is none."""
    unit, _, rest = (answer.headers.get("Content-Range") or "").partition(" ")
    first = rest.partition("-")[0]
    return int(first) if unit == "bytes" and first.isdigit() else -1


def _is_full(file: RemoteFile, partial: Path) -> bool:
    return file.size != -1 and _length(partial) == file.size


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


TAR, ZIP = (".tar", ".tar.gz", ".tgz"), (".zip",)
_FAULTS = (OSError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile)


def download_and_unpack(
    files: Iterable[RemoteFile],
    folder: str | os.PathLike[str],
    *,
    notify: Callable[[str], object] = lambda _: None,
    pause: float = 1.0,
) -> Path:
    """Download files, unpack the archives among them, and remove each archive that is unpacked.

    ``.NAME.unpacked`` remembers an archive, so that a later call continues with what is missing.

    Args:
        files: What to get, with checksums.
        folder: Where everything goes.
        notify: Called with a line before each file.
        pause: See `harness.files.download.download`.

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
        notify(f"{files.index(file) + 1} of {len(files)}: {file.name}, {file.size / 1e6:.1f} MB")
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
