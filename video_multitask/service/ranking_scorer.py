"""Requests to rank candidates: read, made one table, scored by one forward pass, answered.

A request is a mapping::

    {"user": {...}, "context": {...}, "candidates": [{...}, ...], "tasks": [...],
     "best_first": true}

Every field of the model is given once: for the user, for the context, or for each candidate. Null
stands for a missing value. ``context``, ``tasks`` and ``best_first`` may be left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from core_gates.errors import GatesError
from recsys.columns.canonical import (
    MISSING,
    SECONDS,
    canonical,
    is_text,
    numbers_of,
    split_events,
    without_words,
)
from recsys.schema import Dense, FeatureSchema, History, Sparse, source_of
from recsys.table_scorer import Model, chosen_tasks, read_model, refuse_infinite
from recsys.transform import FeatureTransform
from recsys.transform.fitting import has_shifted, places_of
from recsys.vocabulary import HashedValues, Vocabulary
from video_multitask.scorer import Fusion, Powers, fusion_of
from video_multitask.service.contract import Arrays, Kind, RefusedError, columns_of, mapping_of

PARTS = ("user", "context", "candidates", "tasks", "best_first")
DTYPES: Mapping[Kind, Any] = {
    "integer": pl.Int64,
    "flag": pl.Int64,
    "text": pl.String,
    "number": pl.Float64,
    "time": pl.String,
    "integers": pl.List(pl.Int64),
    "texts": pl.List(pl.String),
}
HASHED = 10_000  # values of a column without vocabulary
Unknown = Literal["refuse", "drop", "score"]
WORDS = {"flag": "integer"}  # what has 0 and 1 only may have more on another day
WARM = (1, 16, 128)  # candidates of the requests that warm a model up


class Request(NamedTuple):
    """A request that has been checked.

    Attributes:
        fixed: Fields of user and context.
        columns: Fields of the candidates, a list of N values each.
        rows: N.
        tasks: Places of the tasks whose probabilities are wanted.
        best_first: Whether candidates are sorted by their score.
        of_user: Names of the fields that are given for the user; other ones of ``fixed`` are of the
            context.
    """

    fixed: Mapping[str, Any]
    columns: Mapping[str, list[Any]]
    rows: int
    tasks: Sequence[int]
    best_first: bool
    of_user: Collection[str] = ()

    def place(self, name: str, row: int) -> str:
        """Return where a field of a candidate is given."""
        if name in self.columns:
            return f"candidates[{row}].{name}"
        return f"{'user' if name in self.of_user else 'context'}.{name}"

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
        user = self._columns([given.get("user", {})], "user")
        context = self._columns([given.get("context", {})], "context")
        _refuse_twice(user, context, "context")
        fixed = {name: values[0] for name, values in (user | context).items()}
        columns = self._columns(rows, "candidates")
        _refuse_twice(fixed, columns, "candidates[0]")
        if missing := [name for name in self.kinds if name not in fixed and name not in columns]:
            raise RefusedError(
                f"candidates[0] lacks {missing[0]!r}, and so do user and context; null stands for "
                "a missing value"
            )
        tasks, best_first = self._tasks(given), _truth(given)
        return Request(fixed, columns, len(rows), tasks, best_first, tuple(user))

    def _columns(self, rows: Sequence[Any], part: str) -> dict[str, list[Any]]:
        if self.ignored and all(isinstance(row, dict) for row in rows):
            rows = [{k: v for k, v in row.items() if k not in self.ignored} for row in rows]
        single = part != "candidates"
        given = columns_of(rows, self.kinds, where=part, single=single)
        for name in self._lengths.keys() & given.keys():  # older events have no effect, but a size
            newest = slice(-self._lengths[name], None)
            given[name] = [events and events[newest] for events in given[name]]
        return given

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
        if kind == "time":
            return column.cast(pl.String)
        if kind in ("integers", "texts"):
            lists = split_events(column) if is_text(column.dtype) else column
            of: Kind = "integer" if kind == "integers" else "text"
            events = [None if e is None else self._typed(e, of).to_list() for e in lists]
            return pl.Series(column.name, events, DTYPES[kind])
        typed = canonical(column, "string" if kind == "text" else "integer")
        return typed.set(typed == ("" if kind == "text" else MISSING), None)

    def _series(self, name: str, values: Sequence[Any]) -> pl.Series:
        kind = self.kinds[name]  # times may be numbers in one request and text in another
        return pl.Series(name, values, DTYPES[kind], strict=kind != "time")


def field_kinds(transform: FeatureTransform) -> dict[str, Kind]:
    """Return the fields of a model, and what they hold in JSON."""
    schema = transform.schema
    tables = {f.name: _kind_of(transform.tables[f.table_name]) for f in schema.sparse}
    text = {name: kind == "text" for name, kind in tables.items()}
    kinds: dict[str, Kind] = {f.column: "time" for f in schema.sparse if f.part}
    kinds |= {f.name: tables[f.name] for f in schema.sparse if not f.part}
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
    return list(dict.fromkeys(source_of(column) for column in columns if column.side == "user"))


def _joined(name: str, requests: Sequence[Request]) -> list[Any]:
    """Return the values of a field in all rows of all requests."""
    parts = (
        request.columns[name] if name in request.columns else [request.fixed[name]] * len(request)
        for request in requests
    )
    return list(chain.from_iterable(parts))


def _refuse_twice(given_before: Mapping[str, Any], new: Mapping[str, Any], part: str) -> None:
    if twice := [name for name in new if name in given_before]:
        raise RefusedError(f"{part}.{twice[0]} is given twice: expected it in one place only")


def _truth(given: Mapping[str, Any]) -> bool:
    flag = given.get("best_first", False)
    if not isinstance(flag, bool):
        raise GatesError("best_first: expected true or false")
    return flag


def made_up(transform: FeatureTransform, count: int, seed: int = 0) -> pl.DataFrame:
    """Return rows with a value in every field.

    Args:
        transform: Of the model. Values of its vocabularies are drawn evenly, lengths of histories,
            too; numbers are log-normal with median 7.
        count: Number of rows.
        seed: Of the random numbers.
    """
    draw = np.random.default_rng(seed)
    histories = {history.name: history for history in transform.schema.sequences}
    columns = []
    for name, kind in field_kinds(transform).items():
        if name in histories:
            history = histories[name]
            lengths = draw.integers(0, history.max_length + 1, count)
            values = _values(transform, history.of, int(lengths.sum()), draw)
            ends = np.cumsum(lengths)
            lists = [values[end - n : end].to_list() for n, end in zip(lengths, ends, strict=True)]
            columns.append(pl.Series(name, lists, DTYPES[kind]))
        elif kind == "time":
            columns.append(pl.Series(name, draw.integers(*SECONDS, count)).cast(pl.String))
        elif kind == "number":
            columns.append(pl.Series(name, np.exp(draw.normal(2, 1, count)).round(2)))
        else:
            columns.append(_values(transform, name, count, draw).rename(name))
    return pl.DataFrame(columns)


def _values(
    transform: FeatureTransform, name: str, count: int, draw: np.random.Generator
) -> pl.Series:
    """Return values of a sparse feature."""
    table = transform.tables[transform.sparse_tables[name]]
    if isinstance(table, Vocabulary):
        if not len(table.values):
            return pl.Series(name, [None] * count, table.values.dtype)
        return table.values[draw.integers(0, len(table.values), count)]
    numbers = pl.Series(name, draw.integers(0, HASHED, count))
    return numbers if table.kind == "integer" else numbers.cast(pl.String)


class RankingScorer:
    """Ranks candidates; a `video_multitask.service.contract.Scorer`.

    Args:
        model: Loaded.
        fusion: Of the fused score; None for none.
        unknown: What becomes of values that training has not seen: ``refuse`` the request, ``drop``
            the candidates that have one, or ``score`` them as *unknown*; the answer
            counts them.
    """

    def __init__(
        self, model: Model, fusion: Fusion | None = None, unknown: Unknown = "refuse"
    ) -> None:
        self.version, self.tables = model.version, model.scorer
        self.fusion, self.unknown = fusion, unknown
        self.reader = RequestReader(self.tables.transform, self.tables.task_names)
        self._of_user = set(fields_of_user(self.tables.schema))
        self._fields = {feature.name: source_of(feature) for feature in self.tables.schema.sparse}
        self._ranges = self.tables.transform.fitted.ranges

    @property
    def interface(self) -> dict[str, str]:
        """Fields of requests and tasks of answers, by name."""
        fields = {f"the field {n!r}": WORDS.get(k, k) for n, k in self.reader.kinds.items()}
        return fields | {f"the task {name!r}": "a probability" for name in self.tables.task_names}

    def warm_up(self) -> None:
        """Score candidates of which nothing is known, and rows of values seen in training.

        Raises:
            GatesError: A result is not finite; the model is of no use.
        """
        nothing = dict.fromkeys(self.reader.kinds)
        for rows in WARM:
            answers = self.score([Request(nothing, {}, rows, (), best_first=False)])
            refuse_infinite(answers, self.version)
        probabilities = self.tables.score(made_up(self.tables.transform, WARM[-1])).probabilities
        refuse_infinite({"p": probabilities}, self.version)

    def read(self, content: Any, max_rows: int) -> Request:
        """Check a request, see `video_multitask.service.ranking_scorer`."""
        return self.reader.read(content, max_rows)

    def score(self, requests: Sequence[Request]) -> Arrays:
        """Return ``p`` (N, T), ``score`` (N,) and ``unknown`` (N, F) of all candidates."""
        lists: list[int] = []
        if self.tables.encodes_users and all(self._of_user.isdisjoint(r.columns) for r in requests):
            lists = [len(request) for request in requests]
        scored = self.tables.score(self.reader.table(requests), lists)
        arrays = {"p": scored.probabilities, "unknown": scored.unknown}
        if self.fusion is not None:
            arrays["score"] = self.fusion(scored.probabilities)
        return arrays

    def answer(self, request: Request, found: Arrays) -> Mapping[str, Any]:
        """Return the model, the tasks, and for each candidate its place, probabilities and score.

        Raises:
            RefusedError: A value was not seen in training, and such requests are refused; or the
                best are wanted first, but there is no score.
        """
        counts, known_ids = self._unknown(request, found["unknown"])
        order = np.arange(len(request))
        if request.best_first:
            if "score" not in found:
                raise RefusedError(
                    "best_first: the service has no fused score: leave it out, or serve with "
                    "--fused"
                )
            order = np.argsort(-found["score"], kind="stable")
        order = order[known_ids[order]]
        names = self.tables.task_names
        answer: dict[str, Any] = {
            "model": self.version,
            "tasks": [names[i] for i in request.tasks],
            "candidates": order.tolist(),
            "probabilities": found["p"][order][:, list(request.tasks)].tolist(),
        }
        if "score" in found:
            answer["scores"] = found["score"][order].tolist()
        return answer | {"unknown": counts, "numbers": self._numbers(request)}

    def _numbers(self, request: Request) -> dict[str, dict[str, int]]:
        """Return how many numbers of each field lie outside those of training, where some do.

        ``shifted`` is 1 where their median is far from that of training.
        """
        warnings_of_numbers = {}
        for name, value_range in self._ranges.items():
            values = request.columns.get(name, [request.fixed.get(name)])
            counts = places_of(np.array(values, np.float64), value_range)
            flags = {"outside": int(counts[1] + counts[2]), "shifted": int(has_shifted(counts))}
            if any(flags.values()):
                warnings_of_numbers[name] = flags
        return warnings_of_numbers

    def _unknown(
        self, request: Request, unknown: NDArray[np.bool_]
    ) -> tuple[dict[str, int], NDArray[np.bool_]]:
        """Return in how many candidates each field has a value unseen in training, and who stays.

        Args:
            request: N candidates.
            unknown: (N, F), see `recsys.table_scorer.Scored`.
        """
        counts, stays = dict[str, int](), np.ones(len(request), np.bool_)
        for name, column in zip(self.tables.sparse_names, unknown.T, strict=True):
            if not column.any():
                continue
            counts[name] = int(column.sum())
            field = self._fields.get(name, name)
            if self.unknown == "drop" and field in request.columns:
                stays &= ~column
            elif self.unknown != "score":
                raise RefusedError(
                    f"{request.place(field, int(column.argmax()))} has a value that training has "
                    f"not seen: correct it, or serve with --unknown "
                    f"{'drop or ' if field in request.columns else ''}score"
                )
        return counts, stays


def loader(
    exponents: Powers | None = None,
    offsets: Powers | None = None,
    unknown: Unknown = "refuse",
    *,
    int8: bool = False,
) -> Callable[[Path], RankingScorer]:
    """Return what loads model folders for a service."""

    def load(folder: Path) -> RankingScorer:
        model = read_model(folder, int8=int8)
        fusion = fusion_of(model.scorer.task_names, exponents, offsets)
        return RankingScorer(model, fusion, unknown)

    return load


class ScoredRequests:
    """Bodies of requests, and what models give for their rows, for comparison with a service.

    Args:
        models: By version.

    Attributes:
        first: The model that begins.
        bodies: Of the requests.
    """

    def __init__(self, models: Mapping[str, Model]) -> None:
        self.models = models
        self.first = next(iter(models.values()))
        self.bodies: list[bytes] = []
        self._tables: list[pl.DataFrame] = []
        self._expected: dict[tuple[int, str], Any] = {}

    def make(self, table: pl.DataFrame, candidates: int) -> None:
        """Cut a table into requests; features of the user are those of the first row of each.

        Args:
            table: Rows as ``score`` reads them, of whatever types.
            candidates: Rows of a request.
        """
        scorer = self.first.scorer
        reader = RequestReader(scorer.transform, scorer.task_names)
        users = fields_of_user(scorer.schema)
        others = [name for name in scorer.schema.features if name not in users]
        for start in range(0, len(table), candidates):
            rows = table[start : start + candidates]
            same = rows[[0] * len(rows)].with_columns(rows[name] for name in others)
            typed = reader.typed(same)
            content = {
                "user": typed.select(users).row(0, named=True) if users else {},
                "candidates": typed.select(others).to_dicts(),
            }
            self.bodies.append(json.dumps(content).encode())
            self._tables.append(same)

    def difference(self, place: int, version: str, content: bytes) -> float:
        """Return the largest difference of the probabilities of an answer from those offline."""
        if version not in self.models:
            return math.inf
        if (key := (place, version)) not in self._expected:
            self._expected[key] = self.models[version].scorer.score(self._tables[place])
        expected = self._expected[key].probabilities
        reply = np.array(json.loads(content)["probabilities"])
        return float(np.abs(reply - expected).max()) if reply.shape == expected.shape else math.inf


def rows_for_requests(model: Model, count: int, source: str | None = None) -> pl.DataFrame:
    """Return rows that become requests: the first ones of a file, or made-up ones.

    Args:
        model: That is asked.
        count: Number of rows.
        source: Parquet or CSV file; None for made-up rows.

    Raises:
        GatesError: The file has no rows, or lacks a column.
    """
    if source is None:
        return made_up(model.scorer.transform, count)
    from recsys.data.readers.files import (
        find_parts,  # imports pyarrow, which a service does not need
    )

    schema, (part, *_) = model.scorer.schema, find_parts([source])
    schema.check_columns(part.columns(), labels=False)
    lists = [history.name for history in schema.sequences]
    missing = model.scorer.transform.missing
    first = next(part.blocks(schema.features, lists, missing))[:count]
    if not len(first):
        raise GatesError(f"{part.path} has no rows: name another file by --rows")
    return first
