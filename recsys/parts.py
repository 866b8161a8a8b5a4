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

SUFFIXES = (".parquet", ".csv")
BLOCK_ROWS = 2**15
CSV_BLOCK = 2**22  # bytes
EVENTS = "|"  # between the values of a list in CSV


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
        """Whether it is CSV; Parquet otherwise."""
        return self.path.suffix == ".csv"

    @property
    def first_line(self) -> int:
        """Number of the line, or row, of the first row."""
        return 2 if self.is_csv else 0

    def columns(self) -> list[str]:
        """Return the names of the columns.

        Raises:
            GatesError: The file is empty or cannot be read.
        """
        schema = self._open_csv().schema if self.is_csv else self._open_parquet().schema_arrow
        names = list(schema.names)
        if twice := [name for name in names if names.count(name) > 1]:
            raise GatesError(f"{self.path} has two columns {twice[0]!r}: rename one of them")
        return names

    def num_rows(self) -> int | None:
        """Return the number of rows; None where only reading all of it would tell."""
        return None if self.is_csv else int(self._open_parquet().metadata.num_rows)

    def blocks(self, columns: Sequence[str], lists: Iterable[str] = ()) -> Iterator[pl.DataFrame]:
        """Yield the rows, some thousands at a time.

        All columns of CSV are strings, whatever they hold, so that a block cannot decide about a
        type; an empty field is null.

        Args:
            columns: Those that are read.
            lists: Those of them that hold lists; in CSV their values are separated by ``|``.

        Raises:
            GatesError: The file cannot be read.
        """
        empty = True
        for block in self._blocks(columns, lists):
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

    def _blocks(self, columns: Sequence[str], lists: Iterable[str]) -> Iterator[pl.DataFrame]:
        if self.is_csv:
            split = [pl.col(name).str.split(EVENTS) for name in columns if name in set(lists)]
            for block in self._reading(iter(self._open_csv(columns))):
                yield block.with_columns(split)
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

    def _open_csv(self, columns: Sequence[str] | None = None) -> pa_csv.CSVStreamingReader:
        reading = pa_csv.ReadOptions(use_threads=False, block_size=CSV_BLOCK)
        parsing = pa_csv.ParseOptions(newlines_in_values=True)
        try:
            if columns is None:
                return pa_csv.open_csv(self.path, reading, parsing)
            converting = pa_csv.ConvertOptions(
                column_types=dict.fromkeys(columns, pa.string()),
                include_columns=list(columns),
                strings_can_be_null=True,
                null_values=[""],
            )
            return pa_csv.open_csv(self.path, reading, parsing, converting)
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> GatesError:
        kind = "CSV" if self.is_csv else "Parquet"
        line = " ".join(str(error).split())
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
            raise GatesError(f"{source} is neither .parquet nor .csv: convert or rename it")
        return [Part(source, source.stem)]
    if not source.is_dir():
        raise GatesError(f"{source} does not exist: name a Parquet or CSV file, or a folder")
    found = []
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and path.suffix in SUFFIXES and not hidden:
            found.append(Part(path, name.with_suffix("").as_posix()))
    if not found:
        raise GatesError(f"{source} has no .parquet or .csv file: name another folder")
    return found
