"""Hashes that tell contents apart."""

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
