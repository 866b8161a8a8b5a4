"""What a table file is, and CSV files, every line of which is checked."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
import polars as pl

from core_gates.errors import GatesError
from harness.files.texts import not_utf8, unreadable
from recsys.columns.canonical import split_events, stripped, truth_of, without_words

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


class WatchedFile(io.FileIO):
    """A file, read from its start to its end, that notes blank lines outside of quotes.

    Args:
        path: A text file, lines ending in LF or CRLF.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._path, self._left, self._line = path, b"", 1
        self._quoted = self._followed = False
        self._blank = 0  # number of the first blank line

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next bytes, and look at their lines."""
        content = super().read(size) or b""
        if content:
            self._look(self._left + content)
        elif self._left:
            self._look(self._left + b"\n")
        return content

    def check(self) -> None:
        """Refuse what has been read so far if other lines follow a blank one.

        Raises:
            GatesError: They do; with the line.
        """
        if self._followed:
            raise blank_line(self._path, self._blank)

    def _look(self, content: bytes) -> None:
        letters = np.frombuffer(content, np.uint8)
        ends = np.flatnonzero(letters == ord("\n"))
        complete = int(ends[-1]) + 1 if len(ends) else 0
        quotes = np.flatnonzero(letters[:complete] == ord('"'))
        outside = (np.searchsorted(quotes, ends) + self._quoted) % 2 == 0
        lengths = np.diff(ends, prepend=-1) - 1
        returns = (letters[np.maximum(ends - 1, 0)] == ord("\r")) & (lengths == 1)
        blank = outside & ((lengths == 0) | returns)
        first = 0 if self._blank else int(blank.argmax()) if blank.any() else len(blank)
        if not self._blank and first < len(blank):
            self._blank = self._line + first
        self._followed |= not blank[first:].all()
        self._left, self._line = content[complete:], self._line + len(ends)
        self._quoted ^= len(quotes) % 2 == 1


def blank_line(path: Path, line: int) -> GatesError:
    """Return the error of a file with a blank line before others."""
    return GatesError(f"{path}, line {line}: it is blank, but not the last: delete it")


def read_csv(path: Path, *, missing: Sequence[str] = (), lists: Iterable[str] = ()) -> pl.DataFrame:
    r"""Read a CSV file in UTF-8, with or without a byte order mark, lines ending in LF or CRLF.

    The separator is that of comma, tab, semicolon and bar which the header has most often. Types
    are those of all values: a column with one word is text. Spaces around values do not count.
    Empty fields are null, blank lines at the end are left out, and so is a first column without a
    name, such as the index of pandas.

    Args:
        path: File with a header.
        missing: Further words that are null, such as ``NA`` or ``\N``.
        lists: Columns that hold lists, their values separated by ``|``; absent ones do not matter.

    Raises:
        GatesError: The file is absent, empty or not UTF-8, a name repeats, or a line has more or
            fewer fields than the header; the line is named.
    """
    names, separator = read_header(path)
    try:
        rows = _check_lines(path, separator, len(names)) if len(names) > 1 else None
        table = pl.read_csv(
            path, separator=separator, infer_schema_length=None, null_values=["", *missing]
        )
    except UnicodeDecodeError as error:
        raise not_utf8(path) from error
    except OSError as error:
        raise unreadable(path, error) from error
    except pl.exceptions.PolarsError as error:
        if "utf-8" in str(error):
            raise not_utf8(path) from error
        raise _malformed(path, separator, error) from error
    table = table if rows is None else table.head(rows)
    table.columns = names
    table = table.with_columns(
        _without_spaces(column, missing) for column in table if column.dtype == pl.String
    )
    empty = [column.name for column in table if column.null_count() == len(table)]
    table = table.with_columns(pl.lit(None).alias(name) for name in empty)
    filled = [name for name in names if name in set(lists) - set(empty)]
    table = table.with_columns(without_words(split_events(table[name]), missing) for name in filled)
    return table.drop("") if not names[0] else table


def read_text(path: Path, name: str, *, missing: Sequence[str] = ()) -> pl.Series:
    """Return a column as it is written, such as ``007``, though all its values may be numbers.

    Args:
        path: A file that `read_csv` has read.
        name: Name of the column.
        missing: Further words that are null.
    """
    names, separator = read_header(path)
    place = names.index(name)
    table = pl.read_csv(path, separator=separator, columns=[place], infer_schema=False)
    return stripped(table.to_series().alias(name), missing)


def _without_spaces(column: pl.Series, missing: Sequence[str]) -> pl.Series:
    """Return text without spaces around it; if there were some, of the type that is left."""
    text = stripped(column, missing)
    if text.null_count() == column.null_count() and (text == column).all():
        return column
    for read in (text.cast(pl.Int64, strict=False), text.cast(pl.Float64, strict=False)):
        if read.null_count() == text.null_count():
            return read
    truth = truth_of(text)
    return truth.cast(pl.Boolean) if truth.null_count() == text.null_count() else text


def line_of(path: Path, row: int) -> int:
    """Return the line, from 1, on which a row begins that `read_csv` has read."""
    _, separator = read_header(path)
    with opened(path) as file:
        reader = csv.reader(file, delimiter=separator)
        next(reader)
        line = reader.line_num + 1
        for number, _ in enumerate(reader):
            if number == row:
                return line
            line = reader.line_num + 1
    return line


def _check_lines(path: Path, separator: str, width: int) -> int:
    """Return the number of rows, the header and blank lines at the end left out.

    Raises:
        GatesError: A line has another number of fields, or is blank before others.
    """
    rows = blank = 0
    with opened(path) as file:
        reader = csv.reader(file, delimiter=separator, strict=True)
        try:
            for fields in reader:
                if not fields:
                    blank = blank or reader.line_num
                elif blank:
                    raise blank_line(path, blank)
                elif len(fields) != width:
                    raise GatesError(
                        f"{path}, line {reader.line_num}: it has {len(fields)} fields, the header "
                        f"has {width}: correct the line, or quote fields that contain the separator"
                    )
                else:
                    rows += 1
        except csv.Error as error:
            raise GatesError(
                f"{path}, line {reader.line_num}: {error}: close or double its quotes"
            ) from error
    return rows - 1


def _malformed(path: Path, separator: str, error: Exception) -> GatesError:
    """Return the line whose quotes do not match, or what polars has found."""
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    reader, first = csv.reader(iter(lines), delimiter=separator), 0
    for _ in reader:
        if "".join(lines[first : reader.line_num]).count('"') % 2:
            return GatesError(
                f"{path}, line {first + 1}: it has a quote inside a field: enclose the field in "
                "quotes and double that one"
            )
        first = reader.line_num
    what = str(error).partition("\n")[0]
    return GatesError(f"{path} cannot be read: {what}; correct the file")
