"""A request to rank candidates: JSON to columns, checked field by field, and columns to one table.

A request is a mapping::

    {"user": {...}, "context": {...}, "candidates": [{...}, ...], "tasks": [...],
     "best_first": true}

Every field of the model is given once: for the user, for the context, or for each candidate. Null
stands for a missing value. ``context``, ``tasks`` and ``best_first`` may be left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from apps.video.serving.model import chosen_tasks
from core_gates.errors import GatesError
from recsys.columns.canonical import MISSING, canonical
from recsys.columns.numbers import numbers_of
from recsys.columns.text import is_text, split_events, without_words
from recsys.schema import Dense, FeatureSchema, History, Sparse
from recsys.transform import FeatureTransform
from recsys.vocabulary import HashedValues, Vocabulary
from video_multitask.service.contract import Kind, RefusedError, columns_of, mapping_of

PARTS = ("user", "context", "candidates", "tasks", "best_first")
DTYPES: Mapping[Kind, Any] = {
    "integer": pl.Int64,
    "flag": pl.Int64,
    "text": pl.String,
    "number": pl.Float64,
    "integers": pl.List(pl.Int64),
    "texts": pl.List(pl.String),
}


class Request(NamedTuple):
    """A request that has been checked.

    Attributes:
        fixed: Fields of user and context.
        columns: Fields of the candidates, a list of N values each.
        rows: N.
        tasks: Places of the tasks whose probabilities are wanted.
        best_first: Whether candidates are sorted by their score.
    """

    fixed: Mapping[str, Any]
    columns: Mapping[str, list[Any]]
    rows: int
    tasks: Sequence[int]
    best_first: bool

    def __len__(self) -> int:
        """Return the number of candidates."""
        return self.rows


class RequestReader:
    """Reads requests for one model.

    Args:
        transform: Of the model.
        task_names: Of the model.

    Attributes:
        kinds: Fields of the model, and what they hold.
    """

    def __init__(self, transform: FeatureTransform, task_names: Sequence[str]) -> None:
        self.kinds, self.task_names = field_kinds(transform), tuple(task_names)
        schema, self._missing = transform.schema, transform.missing
        self.ignored = {name for name in schema.keys if name not in self.kinds}
        self._lengths = {history.name: history.max_length for history in schema.sequences}

    def read(self, content: Any, max_rows: int) -> Request:
        """Check the content of a request.

        Raises:
            GatesError: A field is missing, unknown, given twice or of a wrong type; a task is
                unknown; there are no candidates or more than ``max_rows``.
        """
        given = mapping_of(content, PARTS, "the request")
        rows = given.get("candidates")
        if not isinstance(rows, list) or not rows:
            raise RefusedError("candidates: expected a list of one mapping or more")
        if len(rows) > max_rows:
            raise RefusedError(
                f"candidates has {len(rows):,} rows, at most {max_rows:,} are taken: send several "
                "requests"
            )
        fixed: dict[str, Any] = {}
        for part in ("user", "context"):
            found = self._columns([given.get(part, {})], part)
            _refuse_twice(fixed, found, part)
            fixed |= {name: values[0] for name, values in found.items()}
        columns = self._columns(rows, "candidates")
        _refuse_twice(fixed, columns, "candidates[0]")
        if missing := [name for name in self.kinds if name not in fixed and name not in columns]:
            raise RefusedError(
                f"candidates[0] lacks {missing[0]!r}, and so do user and context; null stands for "
                "a missing value"
            )
        return Request(fixed, columns, len(rows), self._tasks(given), _truth(given))

    def _columns(self, rows: Sequence[Any], part: str) -> dict[str, list[Any]]:
        if self.ignored and all(isinstance(row, dict) for row in rows):
            rows = [{k: v for k, v in row.items() if k not in self.ignored} for row in rows]
        single = part != "candidates"
        found = columns_of(rows, self.kinds, where=part, single=single)
        for name in self._lengths.keys() & found.keys():  # older events have no effect, but a size
            newest = slice(-self._lengths[name], None)
            found[name] = [events and events[newest] for events in found[name]]
        return found

    def _tasks(self, given: Mapping[str, Any]) -> list[int]:
        names = given.get("tasks")
        names = [] if names is None else names
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise RefusedError("tasks: expected a list of names")
        return chosen_tasks(self.task_names, names)

    def table(self, requests: Sequence[Request]) -> pl.DataFrame:
        """Return the rows of all requests, in order, as one table."""
        owner = np.repeat(np.arange(len(requests)), [len(request) for request in requests])
        columns = []
        for name in self.kinds:
            if all(name in request.fixed for request in requests):
                values = [request.fixed[name] for request in requests]
                # One column at a time: for a frame, threads of a pool would have to wake up.
                columns.append(self._series(name, values).gather(owner))
            else:
                columns.append(self._series(name, _joined(name, requests)))
        return pl.DataFrame(columns)

    def typed(self, table: pl.DataFrame) -> pl.DataFrame:
        """Return the fields of a table in the types of requests, of the same meaning.

        Raises:
            GatesError: A value is no number where one is needed, or a type holds no values.
        """
        return pl.DataFrame([self._typed(table[name], kind) for name, kind in self.kinds.items()])

    def _typed(self, column: pl.Series, kind: Kind) -> pl.Series:
        column = without_words(column, self._missing)
        if kind == "number":
            return pl.Series(column.name, numbers_of(column)).fill_nan(None)
        if kind in ("integers", "texts"):
            lists = split_events(column) if is_text(column.dtype) else column
            of: Kind = "integer" if kind == "integers" else "text"
            events = [None if e is None else self._typed(e, of).to_list() for e in lists]
            return pl.Series(column.name, events, DTYPES[kind])
        known = canonical(column, "string" if kind == "text" else "integer")
        return known.set(known == ("" if kind == "text" else MISSING), None)

    def _series(self, name: str, values: Sequence[Any]) -> pl.Series:
        return pl.Series(name, values, DTYPES[self.kinds[name]])


def field_kinds(transform: FeatureTransform) -> dict[str, Kind]:
    """Return the fields of a model, and what they hold in JSON."""
    schema = transform.schema
    kinds = {f.name: _kind_of(transform.tables[f.table_name]) for f in schema.sparse}
    text = {name: kind == "text" for name, kind in kinds.items()}
    kinds |= dict.fromkeys((f.name for f in schema.dense), "number")
    return kinds | {h.name: "texts" if text[h.of] else "integers" for h in schema.sequences}


def _kind_of(table: Vocabulary | HashedValues) -> Kind:
    """Return what JSON holds for a feature; a flag where training had 0 and 1 only."""
    if table.kind == "string":
        return "text"
    if isinstance(table, Vocabulary) and len(table.values) and table.values.is_in([0, 1]).all():
        return "flag"
    return "integer"


def fields_of_user(schema: FeatureSchema) -> list[str]:
    """Return the fields that describe the user."""
    columns: tuple[Sparse | Dense | History, ...]
    columns = (*schema.sparse, *schema.dense, *schema.sequences)
    return [column.name for column in columns if column.side == "user"]


def _joined(name: str, requests: Sequence[Request]) -> list[Any]:
    """Return the values of a field in all rows of all requests."""
    parts = (
        request.columns[name] if name in request.columns else [request.fixed[name]] * len(request)
        for request in requests
    )
    return list(chain.from_iterable(parts))


def _refuse_twice(known: Mapping[str, Any], new: Mapping[str, Any], part: str) -> None:
    if twice := [name for name in new if name in known]:
        raise RefusedError(f"{part}.{twice[0]} is given twice: expected it in one place only")


def _truth(given: Mapping[str, Any]) -> bool:
    found = given.get("best_first", False)
    if not isinstance(found, bool):
        raise GatesError("best_first: expected true or false")
    return found
