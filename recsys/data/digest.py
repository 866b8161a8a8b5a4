"""A hash of the content of a table."""

import hashlib

import numpy as np
import polars as pl

from recsys.columns.hashing import hash_integers, hash_strings

BLOCK = 2**18


def table_digest(table: pl.DataFrame) -> str:
    """Return the hexadecimal SHA-256 of names, types and values of a table, in their order.

    It is the same in every process; null, NaN, empty text and empty lists are distinguished.
    """
    found = hashlib.sha256()
    found.update(
        repr([len(table), *zip(table.columns, map(str, table.dtypes), strict=True)]).encode()
    )
    for start in range(0, len(table), BLOCK):
        for column in table[start : start + BLOCK]:
            _add(found, column)
    return found.hexdigest()


def _add(found: "hashlib._Hash", column: pl.Series) -> None:
    found.update(np.packbits(column.is_null().to_numpy()).tobytes())
    if isinstance(column.dtype, pl.Array):
        column = column.arr.to_list()
    if isinstance(column.dtype, pl.List):
        found.update(column.list.len().fill_null(0).cast(pl.Int64).to_numpy().tobytes())
        _add(found, column.filter(column.list.len() > 0).explode())
    elif column.dtype.is_float():
        found.update(column.cast(pl.Float64).fill_null(0.0).to_numpy().tobytes())
    elif column.dtype.is_integer() or column.dtype == pl.Boolean or column.dtype.is_temporal():
        bits = column.to_physical()
        if bits.dtype == pl.UInt64:
            bits = bits.reinterpret(signed=True)
        whole = bits.cast(pl.Int64, strict=False).fill_null(0).to_numpy()
        found.update(hash_integers(whole).tobytes())
    else:
        found.update(hash_strings(column.cast(pl.String)).tobytes())
