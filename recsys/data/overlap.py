"""Test rows that a network has been trained or chosen on."""

from __future__ import annotations

import polars as pl

from core_gates.errors import GatesError
from recsys.data.tables import RankingTables

MOST = 0.5  # of the test rows, from which they are refused


def refuse_seen_rows(tables: RankingTables) -> tuple[str, ...]:
    """Return notes on test rows that are training or validation rows, too.

    Rows are equal if all are that the schema names: features, labels, weights, user, item and
    time. Where few columns with few values are named, rows of any part are often equal, and
    nothing is refused.

    Raises:
        GatesError: Most test rows are training or validation rows, and training rows seldom equal
            each other.
    """
    train, validation, test = _hashes(tables)
    if not len(test) or not len(train):
        return ()
    count = int(test.is_in(pl.concat([train, validation]).unique().implode()).sum())
    if not count:
        return ()
    part, usual = count / len(test), float(train.is_duplicated().mean() or 0.0)  # type: ignore[arg-type]
    said = f"{count:,} of {len(test):,} test rows equal training or validation rows"
    if part > MOST and usual < part / 2:
        raise GatesError(
            f"{tables.name}: {said}, so scores would be those of known rows: test on other rows"
        )
    also = f", as {usual:.0%} of the training rows equal others" if usual else ""
    return (f"{said}{also}",)


def _hashes(tables: RankingTables) -> list[pl.Series]:
    """Return a hash of each row, part by part; a value has the same in all integer types."""
    schema, parts = tables.schema, (tables.train, tables.validation, tables.test)
    named = dict.fromkeys([*schema.features, *schema.labels, *schema.keys])
    names = [n for n in named if all(n in table.columns for table in parts)]
    kinds = {n: _common([table.schema[n] for table in parts]) for n in names}
    return [
        table.select(pl.col(n).cast(kind, strict=False) for n, kind in kinds.items()).hash_rows()
        for table in parts
    ]


def _common(found: list[pl.DataType]) -> pl.DataType:
    """Return a type that holds a column of all parts."""
    if len(set(found)) == 1 and not isinstance(found[0], pl.Categorical | pl.Enum | pl.Array):
        return found[0]
    inner = [kind.inner if isinstance(kind, pl.List | pl.Array) else kind for kind in found]
    plain = pl.Float64() if all(kind.is_numeric() for kind in inner) else pl.String()
    return pl.List(plain) if isinstance(found[0], pl.List | pl.Array) else plain
