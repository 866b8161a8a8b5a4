"""Hashes that distinguish contents, and lists of them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from core_gates.errors import GatesError

LISTED_ABOVE = 10**9  # bytes


class Content(NamedTuple):
    """What a file or folder holds.

    Attributes:
        sha256: Hexadecimal SHA-256 of names and contents, or of names and sizes of a listing.
        size: Bytes.
        listing: Whether it is too large to be read: names and sizes alone are hashed.
    """

    sha256: str
    size: int
    listing: bool = False


class Data(NamedTuple):
    """Data that a result is based on.

    Attributes:
        name: Of the data set.
        role: What it was used for, such as ``training`` or ``test``.
        sha256: Hexadecimal SHA-256 of its content.
        size: Number of units.
        unit: ``bytes``, or what is counted, such as ``objects``.
        listing: Whether names and sizes of files alone are hashed.
    """

    name: str
    role: str
    sha256: str
    size: int
    unit: str = "bytes"
    listing: bool = False

    @classmethod
    def of(cls, name: str, role: str, path: Path) -> Data:
        """Describe a file or folder, see `content_digest`."""
        content = content_digest(path)
        return cls(name, role, content.sha256, content.size, listing=content.listing)

    def state(self) -> dict[str, Any]:
        """Return plain values for JSON; ``listing`` only where it is true."""
        return {n: value for n, value in self._asdict().items() if n != "listing" or value}


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def short_digest(value: Any, digits: int = 16) -> str:
    """Return the first hex digits of the SHA-256 of plain values; keys of mappings in any order."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def content_digest(path: Path, listed_above: int = LISTED_ABOVE) -> Content:
    """Hash a file or a folder; above ``listed_above`` bytes, names and sizes of its files alone.

    Args:
        path: File or folder; hidden files, which are partial ones, are passed over.
        listed_above: Bytes.
    """
    if path.is_file():
        size = path.stat().st_size
        if size <= listed_above:
            return Content(sha256(path), size)
        return Content(short_digest([path.name, size], 64), size, listing=True)
    sizes = {name: (path / name).stat().st_size for name in sorted(_files(path))}
    size = sum(sizes.values())
    if size > listed_above:
        return Content(short_digest(sizes, 64), size, listing=True)
    return Content(short_digest({name: sha256(path / name) for name in sizes}, 64), size)


def _files(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            yield name.as_posix()


FIGSHARE = "https://api.figshare.com/v2"
PAGE = 100
_LENGTHS = {"md5": 32, "sha256": 64}


class RemoteFile(NamedTuple):
    """A file to download.

    Attributes:
        name: Name it gets in the folder, without subfolders.
        url: Where it is.
        size: Bytes; -1 if unknown.
        algorithm: ``md5`` or ``sha256``; empty if there is no checksum.
        digest: Hexadecimal, lower case.
    """

    name: str
    url: str
    size: int = -1
    algorithm: str = ""
    digest: str = ""


def read_manifest(path: str | os.PathLike[str]) -> list[RemoteFile]:
    """Read a JSON list of files, ours or as figshare's API returns it.

    Each entry has ``name``, ``url`` or ``download_url``, ``size``, and ``sha256``, ``md5`` or
    ``computed_md5``.

    Raises:
        GatesError: The file is not such a list, or an entry is unsafe or has no checksum.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GatesError(f"{path} cannot be read as JSON: {error}; check the path") from error
    return parse_manifest(content, str(path))


def parse_manifest(content: Any, source: str) -> list[RemoteFile]:
    """Check the entries of a list of files.

    Raises:
        GatesError: An entry is incomplete, unsafe or has no checksum, or a name occurs twice.
    """
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise GatesError(f"{source} holds no list of files; name a manifest")
    files = [_parse_entry(entry, source) for entry in content]
    names = [file.name for file in files]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise GatesError(f"{source} lists {twice} twice; remove one of the entries")
    return files


def figshare_manifest(article: int, api: str = FIGSHARE, timeout: float = 30.0) -> list[RemoteFile]:
    """Ask figshare for the files of an article.

    Raises:
        GatesError: The service cannot be reached or answers something else.
    """
    entries: list[Any] = []
    page = 1
    while True:
        url = f"{api}/articles/{article}/files?page={page}&page_size={PAGE}"
        try:
            with urllib.request.urlopen(require_http(url), timeout=timeout) as answer:
                part = json.load(answer)
        except (OSError, ValueError, urllib.error.URLError) as error:
            raise GatesError(
                f"{url} cannot be read: {error}; try again or name a manifest"
            ) from error
        if not isinstance(part, list):
            raise GatesError(f"{url} answers no list of files; name a manifest")
        entries += part
        if len(part) < PAGE:
            return parse_manifest(entries, url)
        page += 1


def total_bytes(files: Iterable[RemoteFile]) -> int:
    """Return the bytes of all files whose size is known."""
    return sum(max(file.size, 0) for file in files)


def require_http(url: str) -> str:
    """Return a URL of the web, or raise GatesError for any other, such as ``file:``."""
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise GatesError(f"{url} is not an http or https address; correct the manifest")
    return url


def _parse_entry(entry: dict[str, Any], source: str) -> RemoteFile:
    name = str(entry.get("name", ""))
    if not re.fullmatch(r"[\w][\w .()+-]*", name):
        raise GatesError(f"{source}: {name!r} is not a plain file name; correct the entry")
    url = require_http(str(entry.get("url") or entry.get("download_url") or ""))
    for key, algorithm in (("sha256", "sha256"), ("md5", "md5"), ("computed_md5", "md5")):
        digest = str(entry.get(key) or "").lower()
        if re.fullmatch(f"[0-9a-f]{{{_LENGTHS[algorithm]}}}", digest):
            size = entry.get("size", -1)
            return RemoteFile(name, url, size if isinstance(size, int) else -1, algorithm, digest)
    raise GatesError(f"{source}: {name} has no md5 or sha256; add one, or it cannot be verified")
