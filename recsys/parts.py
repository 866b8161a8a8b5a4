"""Tables in files that do not fit into memory: Parquet and CSV, read block by block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import polars as pl
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from core_gates.errors import GatesError
from recsys.columns.canonical import split_events, stripped, without_words
from recsys.data.table_files import (
    SUFFIXES,
    TEXT,
    Header,
    WatchedFile,
    files_below,
    not_utf8,
    read_header,
    unreadable,
)

BLOCK_ROWS = 2**15
CSV_BLOCK = 2**22  # bytes


class Part(NamedTuple):
    """A file of a table.

    Attributes:
        path: The file.
        name: Its path below the source, without suffix.
    """

    path: Path
    name: str

    @property
    def is_csv(self) -> bool:
        """Whether it is text, separated by whatever; Parquet otherwise."""
        return self.path.suffix in TEXT

    def columns(self) -> list[str]:
        """Return the names of the columns.

        Raises:
            GatesError: The file is empty or cannot be read.
        """
        if self.is_csv:
            return [name for name in read_header(self.path).names if name]
        names = list(self._open_parquet().schema_arrow.names)
        if twice := [name for name in names if names.count(name) > 1]:
            raise GatesError(f"{self.path} has two columns {twice[0]!r}: rename one of them")
        return names

    def num_rows(self) -> int | None:
        """Return the number of rows; None where only reading all of it would tell."""
        return None if self.is_csv else int(self._open_parquet().metadata.num_rows)

    def blocks(
        self, columns: Sequence[str], lists: Iterable[str] = (), missing: Sequence[str] = ()
    ) -> Iterator[pl.DataFrame]:
        """Yield the rows, some thousands at a time.

        All columns of CSV are strings, whatever they hold, so that a block cannot decide about a
        type; spaces around them do not count, and an empty field is null. Otherwise text is read
        as :func:`recsys.data.table_files.read_csv` does, blank lines as well.

        Args:
            columns: Those that are read.
            lists: Those of them that hold lists; in CSV their values are separated by ``|``.
            missing: Further words in CSV that are null.

        Raises:
            GatesError: The file cannot be read.
        """
        empty = True
        for block in self._blocks(columns, lists, missing):
            empty = False
            yield block
        if empty:
            yield self._nothing(columns)

    def _nothing(self, columns: Sequence[str]) -> pl.DataFrame:
        """Return no rows, of the types of the file."""
        if self.is_csv:
            return pl.DataFrame(schema=dict.fromkeys(columns, pl.String))
        schema = self._open_parquet().schema_arrow
        return cast(pl.DataFrame, pl.from_arrow(schema.empty_table().select(list(columns))))

    def _blocks(
        self, columns: Sequence[str], lists: Iterable[str], missing: Sequence[str]
    ) -> Iterator[pl.DataFrame]:
        if self.is_csv:
            split = set(lists)
            for block in self._rows_of_csv(columns):
                texts = {name: stripped(block[name], missing) for name in columns}
                found = {n: split_events(t) if n in split else t for n, t in texts.items()}
                yield pl.DataFrame([without_words(c, missing) for c in found.values()])
        else:
            batches = self._open_parquet().iter_batches(
                batch_size=BLOCK_ROWS, columns=list(columns), use_threads=False
            )
            yield from self._reading(batches)

    def _reading(self, batches: Iterator[pa.RecordBatch]) -> Iterator[pl.DataFrame]:
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (pa.ArrowException, OSError, EOFError) as error:
                raise self._unreadable(error) from error
            yield cast(pl.DataFrame, pl.from_arrow(batch))

    def _open_parquet(self) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self.path, buffer_size=2**20, pre_buffer=False)
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(error) from error

    def _rows_of_csv(self, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
        try:
            watched = WatchedFile(self.path)
        except OSError as error:
            raise unreadable(self.path, error) from error
        header = read_header(self.path)
        with watched:
            for block in self._reading(iter(self._open_csv(watched, header, columns))):
                if len(header.names) > 1:  # else a blank line is a row whose value is missing
                    watched.check()
                yield block

    def _open_csv(
        self, file: WatchedFile, header: Header, columns: Sequence[str]
    ) -> pa_csv.CSVStreamingReader:
        names, separator = header
        reading = pa_csv.ReadOptions(
            use_threads=False, block_size=CSV_BLOCK, column_names=names, skip_rows_after_names=1
        )
        parsing = pa_csv.ParseOptions(
            newlines_in_values=True, delimiter=separator, ignore_empty_lines=len(names) > 1
        )
        converting = pa_csv.ConvertOptions(
            column_types=dict.fromkeys(columns, pa.string()),
            include_columns=list(columns),
            strings_can_be_null=True,
            null_values=[""],
        )
        try:
            return pa_csv.open_csv(file, reading, parsing, converting)
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> GatesError:
        kind = "CSV" if self.is_csv else "Parquet"
        line = " ".join(str(error).split())
        if self.is_csv and "invalid UTF8" in line:
            return not_utf8(self.path)
        return GatesError(f"{self.path} cannot be read as {kind}: {line}; repair or remove it")


def find_parts(sources: Sequence[str | Path]) -> list[Part]:
    """Return the files of sources, in the order of their names.

    Args:
        sources: Files, or folders of files at any depth; hidden ones are passed over.

    Raises:
        GatesError: A source is absent, of another kind or without files, or two files have one
            name.
    """
    parts = [part for source in sources for part in _parts_of(Path(source))]
    seen: dict[str, Part] = {}
    for part in parts:
        if (other := seen.setdefault(part.name, part)) is not part:
            raise GatesError(
                f"{other.path} and {part.path} have the same name {part.name!r}: read them one "
                "after the other"
            )
    return parts


def _parts_of(source: Path) -> list[Part]:
    if source.is_file():
        if source.suffix not in SUFFIXES:
            known = ", ".join(SUFFIXES)
            raise GatesError(f"{source} is no table, expected {known}: convert or rename it")
        return [Part(source, source.stem)]
    if not source.is_dir():
        raise GatesError(f"{source} does not exist: name a Parquet or CSV file, or a folder")
    found = files_below(source)
    if not found:
        raise GatesError(f"{source} has no {', '.join(SUFFIXES)} file: name another folder")
    return [Part(path, path.relative_to(source).with_suffix("").as_posix()) for path in found]
