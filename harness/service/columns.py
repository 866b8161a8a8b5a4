"""Rows of JSON as typed columns, with errors that name field and row."""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from harness.service.scorer import RefusedError

Kind = Literal["integer", "flag", "text", "number", "integers", "texts"]
"""What a field holds, or null; the plural forms are lists. A flag is 0, 1, true or false."""

TYPES: Mapping[Kind, tuple[type, ...]] = {
    "integer": (int,),
    "flag": (int, bool),
    "text": (str,),
    "number": (int, float, bool),
    "integers": (list,),
    "texts": (list,),
}
WANTED: Mapping[Kind, str] = {
    "integer": "an integer or null",
    "flag": "0, 1, true, false or null",
    "text": "a string of at most 1,000 characters or null",
    "number": "a finite number, true, false or null",
    "integers": "a list of integers or null",
    "texts": "a list of strings of at most 1,000 characters or null",
}
ITEMS: Mapping[Kind, Kind] = {"integers": "integer", "texts": "text"}
SHOWN = 40  # characters of a wrong value or name
LONGEST = 1000  # characters of a text: one of a user is repeated for each candidate, and hashed


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
            found = _short(repr(values[row]))
            raise RefusedError(
                f"{places.of(row)}.{name} is {found}: expected {WANTED[kinds[name]]}"
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
    return all(value is None or len(value) <= LONGEST for value in values)


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


def _hint(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name[:SHOWN], known := tuple(known), 1)
    return f": did you mean {close[0]!r}?" if close else f"; known are {', '.join(known[:12])}"
