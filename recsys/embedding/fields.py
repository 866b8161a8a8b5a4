"""Which features are looked up in tables, and where each table lies among stacked rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from core_gates.errors import check_at_least
from recsys.schema import FeatureSchema, Side

SPECIAL_ROWS = 2
"""Rows that every table has: 0 unknown, 1 missing."""

MISSING = 1
"""Row of a missing value; in a history, no event."""


class Field(NamedTuple):
    """A feature that is looked up in a table.

    Attributes:
        name: Name of the feature.
        table: Name of its table.
        dim: Features of its embedding.
        side: Whom it describes.
        buckets: Rows of the remainder table of a quotient-remainder table; 0 for any other.
        fixed: Whether the number of rows is settled by the schema, so that it never grows.
    """

    name: str
    table: str
    dim: int
    side: Side
    buckets: int = 0
    fixed: bool = False


class Block(NamedTuple):
    """Rows of one table, or of a half of a quotient-remainder table, among those of its width.

    Attributes:
        name: Table; with ``.quotient`` or ``.remainder`` for a half.
        table: Name of the table.
        dim: Features of a row.
        start: First row.
        rows: Number of rows.
    """

    name: str
    table: str
    dim: int
    start: int
    rows: int


def fields_of(schema: FeatureSchema) -> tuple[Field, ...]:
    """Return the features with tables, in the order of the columns of ``Batch.sparse``.

    Raises:
        ValueError: Features share a table but not its width, storage or buckets.
    """
    fields = [
        Field(
            s.name,
            s.table_name,
            s.dim or schema.dim,
            s.side,
            s.buckets if s.storage == "quotient_remainder" else 0,
            s.storage == "hash",
        )
        for s in schema.sparse
    ]
    fields += [
        Field(c.name, c.name, c.dim or schema.dim, c.side, fixed=True) for c in schema.crossed
    ]
    fields += [
        Field(d.name, d.name, schema.dim, d.side, fixed=True)
        for d in schema.dense
        if d.scaling == "buckets"
    ]
    first: dict[str, Field] = {}
    for field in fields:
        other = first.setdefault(field.table, field)
        if other[2:3] + other[4:] != field[2:3] + field[4:]:
            raise ValueError(
                f"features {other.name!r} and {field.name!r} share the table {field.table!r} but "
                "not its dim, storage and buckets: give both the same"
            )
    return tuple(fields)


def check_sizes(fields: Iterable[Field], sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the rows of each table, in order of appearance.

    Args:
        fields: Features with tables.
        sizes: Number of rows by name of the table, the special ones included; further names are
            ignored.

    Raises:
        ValueError: A table has no size, or fewer rows than the special ones.
    """
    tables = list(dict.fromkeys(field.table for field in fields))
    if missing := [name for name in tables if name not in sizes]:
        raise ValueError(
            f"sizes lacks the rows of the tables {', '.join(missing)}; it has "
            f"{', '.join(sizes) or 'none'}"
        )
    check_at_least(SPECIAL_ROWS, **{f"rows of table {name!r}": sizes[name] for name in tables})
    return {name: int(sizes[name]) for name in tables}


def blocks_of(fields: Iterable[Field], sizes: Mapping[str, int]) -> dict[str, Block]:
    """Return where each table lies, by name of the block; tables of one width follow each other.

    A quotient-remainder table of V rows and m buckets is two tables of ⌈V / m⌉ and m rows.
    """
    ends: dict[int, int] = {}
    blocks: dict[str, Block] = {}
    for field in {field.table: field for field in fields}.values():
        rows = {field.table: sizes[field.table]}
        if field.buckets:
            rows = {
                f"{field.table}.quotient": -(-sizes[field.table] // field.buckets),
                f"{field.table}.remainder": field.buckets,
            }
        for name, number in rows.items():
            start = ends.get(field.dim, 0)
            blocks[name] = Block(name, field.table, field.dim, start, number)
            ends[field.dim] = start + number
    return blocks
