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
from harness.files.texts import not_utf8, unreadable
from recsys.columns.canonical import (
    RowError,
    canonical,
    form_of,
    kind_of,
    numbers_of,
    part_of,
    split_events,
    stripped,
    without_words,
)
from recsys.data.table_files import (
    SUFFIXES,
    TEXT,
    Header,
    WatchedFile,
    files_below,
    line_of,
    read_csv,
    read_header,
    read_text,
)
from recsys.schema import FeatureSchema, source_of
from recsys.transform.targets import read_targets

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
        as `recsys.data.table_files.read_csv` does, blank lines as well.

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
                named = {n: split_events(t) if n in split else t for n, t in texts.items()}
                yield pl.DataFrame([without_words(c, missing) for c in named.values()])
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
    files = files_of(source)
    if source.is_file():
        return [Part(source, source.stem)]
    return [Part(path, path.relative_to(source).with_suffix("").as_posix()) for path in files]


def read_table(
    path: str | Path,
    *,
    schema: FeatureSchema | None = None,
    columns: Sequence[str] | None = None,
    missing: Sequence[str] = (),
) -> pl.DataFrame:
    """Read a table and check every file of it.

    Files of a folder are read in the order of their paths, hidden ones passed over. Their columns
    may come in any order; those that are not needed and that some file lacks are left out. Where
    one file has numbers in a column and another has text, all become text, of CSV as it is written.

    Args:
        path: ``*.parquet``, ``*.csv`` or ``*.tsv``, see
            `recsys.data.table_files.read_csv`; or a folder of such files at any depth.
        schema: What columns are needed and what they hold; each cell of theirs is checked.
            Histories in text are split at ``|``.
        columns: What columns are needed; all of the first file by default.
        missing: Words in text that are null, besides the empty field.

    Returns:
        All rows and columns, in the order of the first file.

    Raises:
        GatesError: One line with the file, what was found and how to fix it: nothing to read, a
            damaged file, a missing column, types that cannot be joined.
        RowError: A cell holds no number, or no label, where one is needed; with file and line.
    """
    path = Path(path)
    files = files_of(path)
    lists = [history.name for history in schema.sequences] if schema else []
    tables: list[pl.DataFrame] = []
    wanted = list(columns or ())
    for file in files:
        table = read_file(file, missing=missing, lists=lists)
        if schema is not None:
            check_file(file, table, schema)
        _check_present(file, table, wanted or (tables[0].columns if tables else []), files[0])
        tables.append(table)
    if not any(len(table) for table in tables):
        raise GatesError(f"{path} has no rows: name a table with some")
    kept = [name for name in tables[0].columns if all(name in t.columns for t in tables)]
    time = schema.time if schema else ""
    return _joined(files, [table.select(kept) for table in tables], missing, time)


def files_of(path: Path) -> list[Path]:
    """Return the files of a table, ascending by path.

    Raises:
        GatesError: The path is absent, or neither a table nor a folder of them.
    """
    suffixes = ", ".join(SUFFIXES)
    if not path.exists():
        raise GatesError(f"{path} does not exist: name a Parquet or CSV file, or a folder of them")
    if path.is_dir():
        files = files_below(path)
        if not files:
            raise GatesError(f"{path} holds no {suffixes}: name a folder of tables")
        return files
    if path.suffix not in SUFFIXES:
        raise GatesError(f"{path} is no table that can be read, expected {suffixes}: convert it")
    return [path]


def read_file(
    path: Path, *, missing: Sequence[str] = (), lists: Iterable[str] = ()
) -> pl.DataFrame:
    """Return the rows of one file.

    Args:
        path: The file.
        missing: Words in text that are null.
        lists: Columns that hold lists, in CSV with ``|`` between the values.

    Raises:
        GatesError: It cannot be read.
    """
    if path.suffix in TEXT:
        return read_csv(path, missing=missing, lists=lists)
    try:
        table = pl.read_parquet(path, hive_partitioning=False)
    except (OSError, pl.exceptions.PolarsError) as error:
        what = "the file is empty" if not path.stat().st_size else str(error).partition("\n")[0]
        raise GatesError(
            f"{path} cannot be read as Parquet: {what}; it is damaged or incomplete, write it again"
        ) from error
    return table.with_columns(without_words(column, missing) for column in table if missing)


def check_file(path: Path, table: pl.DataFrame, schema: FeatureSchema) -> None:
    """Check the columns and cells of a file that a schema names.

    Raises:
        GatesError: A column is missing or of a wrong type; with the file.
        RowError: A cell cannot be read; with the file and, for text, the line.
    """
    try:
        schema.check_columns(table.columns)
        for sparse in schema.sparse:
            column = part_of(table[source_of(sparse)], sparse.part)
            canonical(column, kind_of(sparse.name, column.dtype) or "integer")
        for dense in schema.dense:
            numbers_of(table[dense.name])
        read_targets(table, schema)
    except RowError as error:
        raise located(error, path) from error
    except GatesError as error:
        raise GatesError(f"{path}: {error}") from error


def located(error: RowError, path: Path) -> RowError:
    """Return the error with its file, and for text its line instead of its row."""
    if path.suffix in TEXT:
        line = line_of(path, error.row)
        return RowError(error.column, line, error.problem, str(path), "line")
    return RowError(error.column, error.row, error.problem, str(path))


def located_in(files: Sequence[Path], error: RowError, *, missing: Sequence[str] = ()) -> RowError:
    """Return the error of a row of joined files with its file, and for text its line."""
    row = error.row
    for file in files:
        count = len(read_file(file, missing=missing))
        if row < count:
            return located(RowError(error.column, row, error.problem), file)
        row -= count
    return error


def _check_present(path: Path, table: pl.DataFrame, wanted: Sequence[str], first: Path) -> None:
    lacking = [name for name in wanted if name not in table.columns]
    if lacking:
        others = f", which {first.name} has" if path != first else ""
        raise GatesError(
            f"{path} lacks the column {lacking[0]!r}{others}; it has "
            f"{', '.join(table.columns[:12])}: add it to the file"
        )


def _joined(
    files: Sequence[Path], tables: Sequence[pl.DataFrame], missing: Sequence[str], time: str
) -> pl.DataFrame:
    """Return the rows of all tables, with one type per column and one form of times."""
    columns = []
    for name in tables[0].columns:
        parts = [table[name] for table in tables]
        forms = dict(zip(map(form_of, parts), files, strict=True)) if name == time else {}
        forms.pop("Null", None)
        if len(forms) > 1:
            (one, file), (other, another), *_ = forms.items()
            raise GatesError(
                f"{file} has {one} in the column of times {name!r}, {another} has {other}: write"
                " them in one form, such as seconds since 1970"
            )
        if any(part.dtype in (pl.String, pl.Categorical, pl.Enum) for part in parts):
            parts = [_text(*each, missing) for each in zip(parts, files, strict=True)]
        kinds = [_family(part.dtype) for part in parts]
        first = next((kind for kind in kinds if kind), "")
        for kind, part, file in zip(kinds, parts, files, strict=True):
            if kind not in ("", first):
                raise GatesError(
                    f"{file}: column {name!r} has type {part.dtype}, in an earlier file it has "
                    f"{first}: write all files with one type"
                )
        columns.append(pl.concat([part.to_frame() for part in parts], how="vertical_relaxed"))
    return pl.concat(columns, how="horizontal")


def _family(dtype: pl.DataType) -> str:
    """Return what types can be joined to one; empty for a column of nulls, which joins any."""
    if dtype == pl.Null:
        return ""
    if dtype.is_numeric() or dtype == pl.Boolean:
        return "numbers"
    return "lists" if dtype.is_nested() else str(dtype)


def _text(column: pl.Series, path: Path, missing: Sequence[str]) -> pl.Series:
    if column.dtype in (pl.String, pl.Null):
        return column.cast(pl.String)
    if path.suffix in TEXT:  # as `score` reads it
        return read_text(path, column.name, missing=missing).head(len(column))
    try:
        text = canonical(column, "string")
    except GatesError as error:
        raise GatesError(f"{path}: {error}") from error
    return text.set(text == "", None)
