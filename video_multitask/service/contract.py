"""What a service scores with, what it refuses, its limits, and rows of JSON as typed columns."""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

from numpy.typing import NDArray

from core_gates.errors import GatesError, check_at_least, check_positive

Arrays = Mapping[str, NDArray[Any]]
"""Results by name, all with the rows as their leading dimension."""

R = TypeVar("R", bound=Sized)
Kind = Literal["integer", "flag", "text", "number", "time", "integers", "texts"]
"""What a field holds, or null; the plural forms are lists. A flag is 0, 1, true or false."""

TYPES: Mapping[Kind, tuple[type, ...]] = {
    "integer": (int,),
    "flag": (int, bool),
    "text": (str,),
    "number": (int, float, bool),
    "time": (int, float, str),
    "integers": (list,),
    "texts": (list,),
}
WANTED: Mapping[Kind, str] = {
    "integer": "an integer or null",
    "flag": "0, 1, true, false or null",
    "text": "a string of at most 1,000 characters or null",
    "number": "a finite number, true, false or null",
    "time": "a time in ISO 8601, in seconds or milliseconds since 1970, or null",
    "integers": "a list of integers or null",
    "texts": "a list of strings of at most 1,000 characters or null",
}
ITEMS: Mapping[Kind, Kind] = {"integers": "integer", "texts": "text"}
SHOWN = 40  # characters of a wrong value or name
LONGEST = 1000  # characters of a text: one of a user is repeated for each candidate, and hashed


class RefusedError(GatesError):
    """A request that is not scored.

    Args:
        line: What was found, what was expected; names field and row.
        status: Of HTTP.
    """

    def __init__(self, line: str, status: int = 422) -> None:
        super().__init__(line)
        self.status = status


class Scorer(Protocol[R]):
    """A model in memory; a request ``R`` is anything whose length is its number of rows."""

    @property
    def version(self) -> str:
        """Name of the model; two models with other weights have other names."""

    @property
    def interface(self) -> Mapping[str, str]:
        """What requests and answers hold, by name; one model replaces another of the same only."""

    def warm_up(self) -> None:
        """Score made-up rows, so that the first request does not wait for lazy initialization.

        Raises:
            Exception: The model is of no use; it is not put into service.
        """

    def read(self, content: Any, max_rows: int) -> R:
        """Check the JSON content of a request, completely: what passes can be scored.

        Raises:
            GatesError: A field is missing, unknown or of a wrong type, or there are too many rows.
        """

    def score(self, requests: Sequence[R]) -> Arrays:
        """Score the rows of all requests at once, in order; called by one thread only."""

    def answer(self, request: R, found: Arrays) -> Any:
        """Return the answer to a request, in values of JSON, given the results of its rows."""


@dataclass(frozen=True)
class Limits:
    """What protects a service, and how it forms batches.

    Attributes:
        max_body_bytes: Bytes of a request; longer ones get 413.
        max_rows: Rows of a request; more get 422, and many more lists and mappings than rows 413.
        max_queue: Requests that wait; beyond that, 429.
        timeout_s: Seconds from arrival to result; later, 503.
        max_wait_ms: Milliseconds that the first request of a batch waits for others.
        max_batch_rows: Rows that are scored at once; a longer request is scored by itself.
        max_batch_requests: Requests that are scored at once; 1: no batching.

    Raises:
        ValueError: A limit is below 1, or a time is not positive.
    """

    max_body_bytes: int = 4 * 2**20
    max_rows: int = 2000
    max_queue: int = 256
    timeout_s: float = 10.0
    max_wait_ms: float = 2.0
    max_batch_rows: int = 4096
    max_batch_requests: int = 64

    def __post_init__(self) -> None:
        """Check that each limit lets something pass."""
        check_at_least(
            1,
            max_body_bytes=self.max_body_bytes,
            max_rows=self.max_rows,
            max_queue=self.max_queue,
            max_batch_rows=self.max_batch_rows,
            max_batch_requests=self.max_batch_requests,
        )
        check_positive(timeout_s=self.timeout_s)
        check_at_least(0, max_wait_ms=self.max_wait_ms)


def columns_of(
    rows: Sequence[Any],
    kinds: Mapping[str, Kind],
    *,
    where: str,
    needed: Iterable[str] = (),
    single: bool = False,
) -> dict[str, list[Any]]:
    """Return the fields of rows as lists of values.

    Fast where all is well; the faulty row is searched for only after a fault was found. True and
    false are 1 and 0 where a field holds numbers.

    Args:
        rows: Mappings; all must have the fields of the first.
        kinds: Fields that are known, and what they hold.
        where: Name of the rows in messages, such as ``items``.
        single: Whether ``where`` is the only row, which has no number then.
        needed: Fields that must be there.

    Raises:
        RefusedError: A row is not a mapping; a field is missing, unknown, or holds something else.
    """
    if not rows:
        return {}
    places = _Places(where, single)
    names = _names(rows, kinds, places)
    if missing := [name for name in needed if name not in names]:
        raise RefusedError(
            f"{places.of(0)} lacks {missing[0]!r}: it is needed; null stands for a missing value"
        )
    columns = {name: [row[name] for row in rows] for name in names}
    for name, values in columns.items():
        if not _holds(values, kinds[name]):
            row = next(i for i, value in enumerate(values) if not _holds([value], kinds[name]))
            shown = _short(repr(values[row]))
            raise RefusedError(
                f"{places.of(row)}.{name} is {shown}: expected {WANTED[kinds[name]]}"
            )
        columns[name] = _plain(values, kinds[name])
    return columns


class _Places(NamedTuple):
    """How rows are called in messages: ``items[2]``, or the name alone of a single one."""

    where: str
    single: bool

    def of(self, row: int) -> str:
        return self.where if self.single else f"{self.where}[{row}]"


def mapping_of(content: Any, known: Iterable[str], where: str) -> Mapping[str, Any]:
    """Return a mapping all of whose names are known.

    Raises:
        RefusedError: It is something else, or has an unknown name.
    """
    if not isinstance(content, dict):
        raise RefusedError(f"{where} is {_kind(content)}: expected a mapping")
    known = tuple(known)
    for name in content:
        if name not in known:
            raise RefusedError(f"{where}: unknown field {_short(repr(name))}{_hint(name, known)}")
    return content


def _names(rows: Sequence[Any], kinds: Mapping[str, Kind], places: _Places) -> tuple[str, ...]:
    """Return the names that all rows share."""
    for number, row in enumerate(rows):
        if type(row) is not dict:
            raise RefusedError(f"{places.of(number)} is {_kind(row)}: expected a mapping of fields")
        if row.keys() != rows[0].keys():
            strange = sorted(row.keys() ^ rows[0].keys())[0]
            what = "lacks" if strange in rows[0] else "has"
            place, first = places.of(number), places.of(0)
            raise RefusedError(
                f"{place} {what} {_short(repr(strange))}, unlike {first}: expected "
                "the same fields in all rows; null stands for a missing value"
            )
    for name in rows[0]:
        if name not in kinds:
            line = f"{places.of(0)}.{_short(name)} is no field of the model{_hint(name, kinds)}"
            raise RefusedError(line)
    return tuple(rows[0])


def _plain(values: list[Any], kind: Kind) -> list[Any]:
    """Return values of a kind as integers, floats or text."""
    if kind == "number":
        return [value if value is None else float(value) for value in values]
    if kind == "flag":
        return [value if value is None else int(value) for value in values]
    return values


def _holds(values: Sequence[Any], kind: Kind) -> bool:
    """Return whether all values are of a kind, or None."""
    if not {type(value) for value in values} <= {*TYPES[kind], type(None)}:
        return False
    if kind in ITEMS:
        return _holds(
            [item for value in values if value is not None for item in value], ITEMS[kind]
        )
    if kind in ("integer", "flag"):
        present = [value for value in values if value is not None]
        return not present or (min(present) >= -(2**63) and max(present) < 2**63)
    if kind == "number":
        return all(value is None or _is_finite(value) for value in values)
    return all(value is None or len(str(value)) <= LONGEST for value in values)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of floats
        return False


def _short(shown: str) -> str:
    return shown if len(shown) <= SHOWN else f"{shown[:SHOWN]} …"


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _hint(name: str, choices: Iterable[str]) -> str:
    close = difflib.get_close_matches(name[:SHOWN], choices := tuple(choices), 1)
    return f": did you mean {close[0]!r}?" if close else f"; known are {', '.join(choices[:12])}"
