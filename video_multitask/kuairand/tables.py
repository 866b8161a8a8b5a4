"""Read a table part by part from CSV or Parquet, with errors that name file, line and column."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from core_gates.errors import GatesError
from video_multitask.kuairand.checks import checked
from video_multitask.kuairand.columns import Column, Columns

ROWS_AT_ONCE = 2**18
_BYTES_AT_ONCE = 2**23
_PLACE = re.compile(r"In CSV column #(\d+): Row #(\d+): .*invalid value '(.*)'", re.DOTALL)
_FIELDS = re.compile(r"Row #(\d+): Expected (\d+) columns, got (\d+)")


def read_table(
    path: Path,
    columns: Columns,
    *,
    optional: Sequence[str] = (),
    keep: Sequence[str] = (),
    drop_invalid: bool = False,
) -> Iterator[pl.DataFrame]:
    """Yield a table in parts of bounded size, in the order of the file.

    The order of the columns in the file does not matter; further ones are left out. Line ends may
    be those of Windows, quoted fields may contain commas. Codes of missing values become null.

    Args:
        path: A CSV file with a header, or a Parquet file.
        columns: Columns that are read.
        optional: Those among them that may be absent.
        keep: Further columns, returned as they are; absent ones are passed over.
        drop_invalid: Leave out rows with values that are empty or out of range, instead of
            refusing the file.

    Raises:
        GatesError: The file is missing, empty, cut off, lacks a column or has a wrong value; the
            line counts from 1, the header's.
    """
    if not path.is_file():
        raise GatesError(f"{path} is not a file; check the path")
    if path.stat().st_size == 0:
        raise GatesError(f"{path} is empty; a header and rows were expected, get it again")
    is_csv = path.suffix != ".parquet"
    header = _csv_header(path) if is_csv else _parquet_header(path)
    _check_header(path, header, columns, optional)
    wanted = [name for name in columns if name in header]
    wanted += [name for name in keep if name in header and name not in columns]
    parts = _csv_parts(path, header, wanted, columns) if is_csv else _parquet_parts(path, wanted)
    rows = 0
    for part in parts:
        first = rows + (2 if is_csv else 1)
        yield checked(part, columns, str(path), first, drop_invalid=drop_invalid)
        rows += len(part)
    if rows == 0:
        raise GatesError(f"{path} has a header and no rows; get it again")


def _check_header(path: Path, header: list[str], columns: Columns, optional: Sequence[str]) -> None:
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise GatesError(f"{path}, line 1: column {twice[0]!r} occurs twice; remove one of them")
    missing = [name for name in columns if name not in header and name not in optional]
    if missing:
        raise GatesError(
            f"{path}, line 1: columns {', '.join(missing[:5])} are missing; found "
            f"{', '.join(header[:8])}{' …' if len(header) > 8 else ''}"
        )


def _csv_header(path: Path) -> list[str]:
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        return [name.strip() for name in next(csv.reader([file.readline()]), [])]


def _csv_parts(
    path: Path, header: list[str], wanted: list[str], columns: Columns
) -> Iterator[pl.DataFrame]:
    types = {name: _arrow_type(columns[name]) for name in wanted if name in columns}
    try:
        reader = pyarrow.csv.open_csv(
            path,
            read_options=pyarrow.csv.ReadOptions(
                use_threads=False, block_size=_BYTES_AT_ONCE, column_names=header, skip_rows=1
            ),
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=False),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=types, include_columns=wanted, strings_can_be_null=True,
                null_values=[""], quoted_strings_can_be_null=True,
            ),
        )  # fmt: skip
        for batch in reader:
            yield pl.DataFrame(pl.from_arrow(batch))
    except pa.ArrowInvalid as error:
        if "Empty CSV" in str(error):
            return
        raise GatesError(_csv_fault(path, header, str(error))) from error


def _arrow_type(column: Column) -> pa.DataType:
    """Return the type a field is parsed to: next to blanks, pandas writes whole numbers as 1.0."""
    if column.dtype == pl.String:
        return pa.string()
    return pa.float64() if column.dtype.is_float() or column.blank else pa.int64()


def _csv_fault(path: Path, header: list[str], message: str) -> str:
    """Return what pyarrow found, with the name of the column and the line."""
    if place := _PLACE.search(message):
        column, line, value = header[int(place[1])], int(place[2]), place[3]
        kind = "whole number" if "int64" in message else "number"
        return f"{path}, line {line}, column {column}: {value!r} is not a {kind}; correct it"
    if fields := _FIELDS.search(message):
        return (
            f"{path}, line {fields[1]}: {fields[3]} fields, expected the {fields[2]} of the "
            "header; the file may be cut off, get it again"
        )
    return f"{path} cannot be read as CSV: {message.splitlines()[0]}; get it again"


def _parquet_header(path: Path) -> list[str]:
    try:
        return list(pq.read_schema(path).names)
    except (pa.ArrowInvalid, OSError) as error:
        raise GatesError(
            f"{path} is not a complete Parquet file ({str(error).splitlines()[0]}); get it again"
        ) from error


def _parquet_parts(path: Path, wanted: list[str]) -> Iterator[pl.DataFrame]:
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=wanted):
                yield pl.DataFrame(pl.from_arrow(batch)).select(wanted)
    except (pa.ArrowInvalid, OSError) as error:
        raise GatesError(
            f"{path} is damaged ({str(error).splitlines()[0]}); get it again"
        ) from error
