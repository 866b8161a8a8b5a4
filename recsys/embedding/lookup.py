"""Which features are looked up in tables, where each table lies, and one gather for all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

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


class Lookup(nn.Module):
    """From rows of tables to vectors, for features of one width, in a single gather.

    The tables lie on top of each other, so that a row number plus the offset of its table is a row
    of all. A quotient-remainder row r of m buckets is the product of row ⌊r / m⌋ of one table and
    row r mod m of another (Shi et al., 2020, arXiv 1909.02107).

    Args:
        fields: All features with tables, in the order of the columns.
        chosen: Numbers of those that are looked up; all of one width.
        blocks: Where the tables lie.
        sizes: Rows of each table.
        device: Device of the offsets.

    Attributes:
        order: The chosen features in the order of the result: plain ones first.
    """

    def __init__(
        self,
        fields: Sequence[Field],
        chosen: Sequence[int],
        blocks: Mapping[str, Block],
        sizes: Mapping[str, int],
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.order = tuple(sorted(chosen, key=lambda i: (fields[i].buckets > 0, i)))
        mine = [fields[i] for i in self.order]
        factored = [field for field in mine if field.buckets]
        self.num_plain, self.num_factored = len(mine) - len(factored), len(factored)
        self.in_place = self.order == tuple(range(len(fields)))
        values = {
            "columns": list(self.order),
            "limits": [sizes[field.table] for field in mine],
            "starts": [blocks[_first(field)].start for field in mine],
            "buckets": [field.buckets for field in factored],
            "remainder_starts": [blocks[f"{field.table}.remainder"].start for field in factored],
        }
        for name, numbers in values.items():
            made = torch.tensor(numbers, dtype=torch.int64, device=device)
            self.register_buffer(name, made, persistent=False)

    def forward(self, rows: Tensor, tables: nn.Module) -> Tensor:
        """Return the vectors (B, K, d) in the order of ``order``.

        Args:
            rows: Rows of the tables (B, F) of all features.
            tables: Returns rows (..., d) of all tables of the width, given their numbers.

        Raises:
            ValueError: A row is negative or beyond its table, found on the CPU.
        """
        columns, limits, starts = self._numbers("columns", "limits", "starts")
        mine = rows if self.in_place else rows.index_select(1, columns)
        _check(mine, limits)
        if not self.num_factored:
            return cast(Tensor, tables(mine + starts))
        buckets, remainder_starts = self._numbers("buckets", "remainder_starts")
        plain, factored = mine.split([self.num_plain, self.num_factored], 1)
        quotients = factored.div(buckets, rounding_mode="floor")
        first = torch.cat([plain, quotients], 1) + starts
        places = torch.cat([first, factored % buckets + remainder_starts], 1)
        vectors, left, right = tables(places).split(
            [self.num_plain, self.num_factored, self.num_factored], 1
        )
        return torch.cat([vectors, left * right], 1)

    def _numbers(self, *names: str) -> list[Tensor]:
        return [cast(Tensor, getattr(self, name)) for name in names]


def look_up(
    field: Field, rows: Tensor, blocks: Mapping[str, Block], size: int, tables: nn.Module
) -> Tensor:
    """Return the vectors (..., d) of rows (...) of the table of one feature.

    Raises:
        ValueError: A row is negative or beyond the table, found on the CPU.
    """
    _check(rows, torch.tensor(size) if rows.device.type == "cpu" else None)
    start = blocks[_first(field)].start
    if not field.buckets:
        return cast(Tensor, tables(rows + start))
    remainder = blocks[f"{field.table}.remainder"].start
    left = tables(rows.div(field.buckets, rounding_mode="floor") + start)
    return cast(Tensor, left * tables(rows % field.buckets + remainder))


def _first(field: Field) -> str:
    return f"{field.table}.quotient" if field.buckets else field.table


def _check(rows: Tensor, limits: Tensor | None) -> None:
    """Refuse rows of no table, which would silently be rows of its neighbor."""
    if limits is None or rows.device.type != "cpu" or torch.compiler.is_compiling():
        return
    wrong = (rows < 0) | (rows >= limits)
    if wrong.any():
        place = wrong.nonzero()[0]
        limit = int(limits.expand(rows.shape)[tuple(place)])
        raise ValueError(
            f"row {int(rows[tuple(place)])} in column {int(place[-1])} lies outside of its table of"
            f" {limit} rows: encode the data with the transform that the sizes are of"
        )
