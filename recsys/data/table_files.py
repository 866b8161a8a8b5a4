"""What a table file is, and how text in one is laid out: the rule of all who read tables."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple, TextIO

from core_gates.errors import GatesError

TEXT = (".csv", ".tsv")
PARQUET = (".parquet", ".pq")
SUFFIXES = (*PARQUET, *TEXT)
SEPARATORS = ",\t;|"


class Header(NamedTuple):
    """The first line of a text file.

    Attributes:
        names: Of the columns, without spaces around them; the first may be empty.
        separator: The one of comma, tab, semicolon and bar that the line has most often.
    """

    names: list[str]
    separator: str


def files_below(folder: Path) -> list[Path]:
    """Return the table files of a folder at any depth, ascending by name; hidden ones left out."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix in SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    ]


def read_header(path: Path) -> Header:
    """Return what the first line of a text file tells.

    Raises:
        GatesError: The file cannot be read, is empty or not UTF-8, or a name repeats or is missing.
    """
    try:
        return _header(path)
    except UnicodeDecodeError as error:
        raise not_utf8(path) from error
    except OSError as error:
        raise unreadable(path, error) from error


def opened(path: Path) -> TextIO:
    """Return a text file, open, after its byte order mark."""
    return path.open(encoding="utf-8-sig", newline="")


def unreadable(path: Path, error: OSError) -> GatesError:
    """Return the error of a file that cannot be opened."""
    return GatesError(f"{path} cannot be read: {error.strerror or error}; check the path")


def not_utf8(path: Path) -> GatesError:
    """Return the error of a file with other bytes than UTF-8, with the first line of them."""
    with path.open("rb") as file:
        for line, content in enumerate(file, 1):
            try:
                content.decode()
            except UnicodeDecodeError as error:
                return GatesError(
                    f"{path}, line {line}: byte {error.start + 1} is not UTF-8: save the file in "
                    "that encoding"
                )
    return GatesError(f"{path} is not UTF-8: save it in that encoding")


def _header(path: Path) -> Header:
    with opened(path) as file:
        first = file.readline()
        if not first.strip():
            what = "begins with a blank line" if first else "is empty"
            raise GatesError(f"{path} {what}: a line with the names of the columns was expected")
        separator = max(SEPARATORS, key=first.count)
        file.seek(0)
        names = [name.strip() for name in next(csv.reader(file, delimiter=separator))]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated or "" in names[1:]:
        what = f"two columns named {repeated[-1]!r}" if any(repeated) else "columns without a name"
        raise GatesError(f"{path}, line 1: it has {what}: give each column its name")
    return Header(names, separator)
