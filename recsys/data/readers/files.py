"""Any table: a Parquet file, a CSV file, or a folder of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import polars as pl

from core_gates.errors import GatesError
from recsys.columns.canonical import RowError, canonical, kind_of, numbers_of, without_words
from recsys.data.table_files import SUFFIXES, TEXT, files_below, line_of, read_csv, read_text
from recsys.schema import FeatureSchema
from recsys.transform.targets import read_targets


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
            :func:`recsys.data.table_files.read_csv`; or a folder of such files at any depth.
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
    return _joined(files, [table.select(kept) for table in tables], missing)


def files_of(path: Path) -> list[Path]:
    """Return the files of a table, ascending by path.

    Raises:
        GatesError: The path is absent, or neither a table nor a folder of them.
    """
    known = ", ".join(SUFFIXES)
    if not path.exists():
        raise GatesError(f"{path} does not exist: name a file or a folder of {known}")
    if path.is_dir():
        found = files_below(path)
        if not found:
            raise GatesError(f"{path} holds no {known}: name a folder of tables")
        return found
    if path.suffix not in SUFFIXES:
        raise GatesError(f"{path} is no table that can be read: expected {known}")
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
            kind = kind_of(sparse.name, table[sparse.name].dtype)
            canonical(table[sparse.name], kind or "integer")
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
    files: Sequence[Path], tables: Sequence[pl.DataFrame], missing: Sequence[str]
) -> pl.DataFrame:
    """Return the rows of all tables, with one type per column."""
    columns = []
    for name in tables[0].columns:
        parts = [table[name] for table in tables]
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
