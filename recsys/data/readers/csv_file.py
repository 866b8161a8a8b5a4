"""CSV files, every line of which is checked."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from core_gates.errors import GatesError
from recsys.columns.text import split_events, stripped, truth_of, without_words
from recsys.data.table_files import not_utf8, opened, read_header, unreadable
from recsys.data.watched_file import blank_line

CHUNK = 2**24  # bytes


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
    found = [name for name in names if name in set(lists) - set(empty)]
    table = table.with_columns(without_words(split_events(table[name]), missing) for name in found)
    return table.drop("") if not names[0] else table


def read_text(path: Path, name: str, *, missing: Sequence[str] = ()) -> pl.Series:
    """Return a column as it is written, such as ``007``, though all its values may be numbers.

    Args:
        path: A file that :func:`read_csv` has read.
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


def line_of(path: Path, row: int, *, skip_blank: bool = False) -> int:
    """Return the line, from 1, on which a row begins.

    Args:
        path: A text file with a header.
        row: Number of the row, from 0, as :func:`read_csv` counts.
        skip_blank: Whether blank lines are no rows, as :class:`recsys.parts.Part` counts.
    """
    _, separator = read_header(path)
    with opened(path) as file:
        reader = csv.reader(file, delimiter=separator)
        next(reader)
        line, left = reader.line_num + 1, row
        for fields in reader:
            if fields or not skip_blank:
                if not left:
                    return line
                left -= 1
            line = reader.line_num + 1
    return line


def _check_lines(path: Path, separator: str, width: int) -> int:
    """Return the number of rows, the header and blank lines at the end left out."""
    counter = _LineCounter(path, width)
    if not _count_bytes(path, separator, counter):
        counter = _LineCounter(path, width)
        _count_fields(path, separator, counter)
    return counter.rows - 1


class _LineCounter:
    """Counts lines with the right number of fields and refuses all others."""

    def __init__(self, path: Path, width: int) -> None:
        self.path, self.width = path, width
        self.rows = self._blank = 0

    def refuse(self, line: int, fields: int) -> None:
        if fields:
            raise GatesError(
                f"{self.path}, line {line}: it has {fields} fields, the header has {self.width}: "
                "correct the line, or quote fields that contain the separator"
            )
        raise blank_line(self.path, line)

    def add(self, line: int, fields: int) -> None:
        """Count one line, blank if it has no fields."""
        if not fields:
            self._blank = self._blank or line
            return
        if self._blank or fields != self.width:
            self.refuse(self._blank or line, 0 if self._blank else fields)
        self.rows += 1

    def add_all(self, first: int, fields: NDArray[np.int64]) -> None:
        """Count lines (N,), the first of which has the number ``first``."""
        other = np.flatnonzero(fields != self.width)
        if not self._blank and not len(other):
            self.rows += len(fields)
            return
        for line, found in enumerate(fields.tolist(), first):
            self.add(line, found)


def _count_bytes(path: Path, separator: str, counter: _LineCounter) -> bool:
    """Count the lines of a file without quotes; return False where it has one."""
    left, line = b"", 1
    with path.open("rb") as file:
        while content := file.read(CHUNK):
            if b'"' in content:
                return False
            content = left + content
            end = content.rfind(b"\n") + 1
            left = content[end:]
            line += _add_lines(content[:end], separator, line, counter)
    if left:
        _add_lines(left + b"\n", separator, line, counter)
    return True


def _add_lines(content: bytes, separator: str, first: int, counter: _LineCounter) -> int:
    letters = np.frombuffer(content, np.uint8)
    ends = np.flatnonzero(letters == ord("\n"))
    found = np.flatnonzero(letters == ord(separator))
    fields = np.diff(np.searchsorted(found, ends), prepend=0) + 1
    lengths = np.diff(ends, prepend=-1) - 1
    returns = (letters[np.maximum(ends - 1, 0)] == ord("\r")) & (lengths == 1)
    fields[(lengths == 0) | returns] = 0
    counter.add_all(first, fields)
    return len(ends)


def _count_fields(path: Path, separator: str, counter: _LineCounter) -> None:
    """Count the lines of a file with quotes, between which are separators and line ends."""
    with opened(path) as file:
        reader = csv.reader(file, delimiter=separator, strict=True)
        try:
            for fields in reader:
                counter.add(reader.line_num, len(fields))
        except csv.Error as error:
            raise GatesError(
                f"{path}, line {reader.line_num}: {error}: close or double its quotes"
            ) from error


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
