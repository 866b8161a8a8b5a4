"""Hashes that distinguish contents."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

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
    def of(cls, name: str, role: str, path: Path) -> "Data":
        """Describe a file or folder, see :func:`content_digest`."""
        found = content_digest(path)
        return cls(name, role, found.sha256, found.size, listing=found.listing)

    def state(self) -> dict[str, Any]:
        """Return plain values for JSON; ``listing`` only where it is true."""
        return {n: value for n, value in self._asdict().items() if n != "listing" or value}


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def short_digest(value: Any, digits: int = 16) -> str:
    """Return the first hexadecimal digits of the SHA-256 of plain values, whatever their order."""
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
