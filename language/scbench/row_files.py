"""Files of SCBench: JSON lines or Parquet, as they were published, read, checked and written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from core_gates.errors import GatesError, MissingExtraError, check_option
from harness.files import replacing
from harness.files.texts import read_utf8
from language.scbench.row import PREFIX, TASKS, Answer, Origin, Row, Turn

CONFIGS = (PREFIX, "multi_turn_")
"""What precedes the name of a task in the names of files and folders; the second is the older."""

OPTIONS = 4
HALF = re.compile("[\ud800-\udfff]")
"""Half of a character of two parts, which JSON can have and UTF-8 cannot."""

ROW_FIELDS = ("id", "context", "input", "multi_turns", "origin", "new_tokens")
TURN_FIELDS = ("input", "answer", "options", "task", "depth")


def read_rows(path: Path, task: str) -> list[Row]:
    """Read the rows of a task.

    Args:
        path: A file of JSON lines or Parquet; or a folder with ``scbench_<task>.jsonl``, in it or
            in ``data``, or ``scbench_<task>/test-*.parquet``. Older files are named ``multi_turn_``
            and ``train``.
        task: Short name of the task.

    Returns:
        At least one. Rows without an ``id`` are numbered from 0.

    Raises:
        MissingExtraError: The file is Parquet, and pyarrow is missing.
        GatesError: There is no such file or more than one, or it is damaged or has a row that is
            not whole; with file and line.
    """
    check_option("task", task, TASKS, GatesError)
    rows: dict[int, Row] = {}
    for file in _files_of(path, task) if path.is_dir() else [path]:
        for place, record in (_parquet if file.suffix == ".parquet" else _json_lines)(file):
            row = _row(record, task, place, len(rows))
            _require(
                row.id not in rows,
                f"{place}: id {row.id} is that of an earlier row: give each row its own, or none of"
                " them an id",
            )
            rows[row.id] = row
    _require(rows, f"{path} holds no rows: get the file of {PREFIX}{task} again")
    return list(rows.values())


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows in the official schema, with the depth of each answer where it is known.

    Args:
        path: File that is replaced: Parquet where its name ends so, otherwise JSON lines.
        rows: Of one task.

    Raises:
        MissingExtraError: The file is Parquet, and pyarrow is missing.
        GatesError: It cannot be written.
    """
    records = [_record(row) for row in rows]
    with replacing(path) as temporary:
        if path.suffix == ".parquet":
            pa, pq = _pyarrow()
            names = dict.fromkeys(name for record in records for name in record)
            columns = {name: [record.get(name) for record in records] for name in names}
            try:
                pq.write_table(pa.table(columns), temporary)
            except (pa.ArrowException, OverflowError) as error:
                raise GatesError(
                    f"{path} cannot be written as Parquet, where a field has one type"
                    f" ({' '.join(str(error).split())}): name it .jsonl"
                ) from error
        else:
            lines = (json.dumps(record, ensure_ascii=False) for record in records)
            temporary.write_bytes("".join(f"{line}\n" for line in lines).encode())


def _files_of(folder: Path, task: str) -> list[Path]:
    """Return the files of a task in a folder: one, or all parts of a table."""
    found: dict[str, list[Path]] = {}
    for config in (f"{prefix}{task}" for prefix in CONFIGS):
        for name in (f"{config}.jsonl", f"{config}/test*.parquet", f"{config}/train*.parquet"):
            found |= {where: sorted(folder.glob(where)) for where in (name, f"data/{name}")}
    groups = [paths for paths in found.values() if paths]
    _require(
        groups,
        f"{folder} has neither {PREFIX}{task}.jsonl nor {PREFIX}{task}/test-*.parquet: give the"
        " folder of a copy of microsoft/SCBench",
    )
    first, last = groups[0][0], groups[-1][0]
    _require(len(groups) == 1, f"{first} and {last} are both of {task}: remove one of them")
    parts, number = first.stem.rpartition("-of-")[2], len(groups[0])
    _require(
        not parts.isdigit() or int(parts) == number,
        f"{first} is one of {parts.lstrip('0')} parts, {number} found: get all",
    )
    return groups[0]


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield place and content of each line that is not blank."""
    for number, line in enumerate(read_utf8(path).split("\n"), 1):
        if line.strip():
            place = f"{path}, line {number}"
            try:
                yield place, json.loads(line, parse_constant=_refuse)
            except (ValueError, RecursionError) as error:
                raise GatesError(
                    f"{place} is not JSON ({error}): the file may be truncated, get it again"
                ) from error


def _refuse(constant: str) -> NoReturn:
    """Refuse NaN and infinities, which JSON does not have."""
    raise ValueError(f"{constant} is not a number")


def _pyarrow() -> tuple[Any, Any]:
    """Return pyarrow and its Parquet."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        raise MissingExtraError("language", "pyarrow") from error
    return pa, pq


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield place and content of each row."""
    pa, pq = _pyarrow()
    number = 0
    try:
        with pq.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=1):
                number += 1
                yield f"{path}, row {number}", batch.to_pylist()[0]
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise GatesError(
            f"{path}, row {number + 1}, cannot be read as Parquet ({reason}): get the file again"
        ) from error


def _row(record: Any, task: str, place: str, number: int) -> Row:
    """Return a row that is whole."""
    record = _fields(record, place, "a context")
    turns, identity = record.get("multi_turns"), record.get("id", number)
    origin, new_tokens = record.get("origin", "file"), record.get("new_tokens")
    _require(
        isinstance(turns, list) and turns,
        f"{place}: multi_turns is {'empty' if turns == [] else _kind(turns)}, expected a list of at"
        " least one question",
    )
    _require(type(identity) is int, f"{place}: id is {_kind(identity)}, expected an integer")
    _require(
        origin in get_args(Origin),
        f"{place}: origin is {origin!r}, expected {' or '.join(get_args(Origin))}",
    )
    _require(
        new_tokens is None or (type(new_tokens) is int and new_tokens >= 3),
        f"{place}: new_tokens is {new_tokens!r}, expected an integer from 3",
    )
    extra = {name: value for name, value in record.items() if name not in ROW_FIELDS}
    for name in ("lang", "repo") if "repoqa" in (task, *TASKS[task].parts) else ():
        _text(extra.get(name), name, place)
    context = record.get("context", record.get("input"))
    if task == "mf":
        _require(
            isinstance(context, list) and context and {type(n) for n in context} == {int},
            f"{place}: context is {_kind(context)}, expected a list of integers for Math.Find",
        )
        context = str(context)
    return Row(
        task,
        identity,
        _text(context, "context", place),
        tuple(_turn(turn, task, f"{place}, turn {n}") for n, turn in enumerate(turns, 1)),
        extra,
        origin,
        new_tokens,
    )


def _turn(turn: Any, task: str, place: str) -> Turn:
    """Return a turn that is whole."""
    turn = _fields(turn, place, "input and answer")
    part, depth, options = None, turn.get("depth"), turn.get("options", [])
    if parts := TASKS[task].parts:
        part = _text(turn.get("task"), "task", place).removeprefix(PREFIX)
        names = f" or {PREFIX}".join(parts)
        _require(part in parts, f"{place}: task is {part!r}, expected {PREFIX}{names}")
    extra = {name: value for name, value in turn.items() if name not in TURN_FIELDS}
    if (part or task) == "repoqa":
        _text(extra.get("name"), "name", place)
    _require(
        depth is None or (isinstance(depth, (int, float)) and 0 <= depth <= 1),
        f"{place}: depth is {depth!r}, expected a number from 0 to 1",
    )
    answer = _answer(turn.get("answer"), part or task, place)
    _require(isinstance(options, list), f"{place}: options is {_kind(options)}, expected a list")
    options = tuple(_text(option, "an option", place) for option in options)
    _require(
        task != "choice_eng" or (len(options) == OPTIONS and answer in options),
        f"{place}: {len(options)} options, {'with' if answer in options else 'without'} the answer,"
        f" expected {OPTIONS} with the answer",
    )
    return Turn(_text(turn.get("input"), "input", place), answer, options, part, depth, extra)


def _answer(answer: Any, task: str, place: str) -> Answer:
    """Return an answer: an integer of Math.Find, names of Retr.MultiHop, otherwise text."""
    _require(
        answer not in (None, "", []),
        f"{place} has no answer: get the file again, nothing can be scored",
    )
    if task == "mf":
        number = answer[0] if isinstance(answer, list) and len(answer) == 1 else answer
        _require(type(number) is int, f"{place}: answer is {_kind(answer)}, expected an integer")
        return int(number)
    if isinstance(answer, list):
        return tuple(_text(text, "an answer", place) for text in answer)
    _require(task != "vt", f"{place}: answer is {_kind(answer)}, expected a list of names")
    return _text(answer, "answer", place)


def _fields(record: Any, place: str, expected: str) -> dict[str, Any]:
    """Return the fields of an object that are not null."""
    _require(
        isinstance(record, dict),
        f"{place}: it is {_kind(record)}, expected an object with {expected}",
    )
    return {name: value for name, value in record.items() if value is not None}


def _text(value: Any, name: str, place: str) -> str:
    """Return what must be text that is not blank."""
    _require(
        isinstance(value, str) and value.strip(),
        f"{place}: {name} is {_kind(value)}, expected text",
    )
    half = HALF.search(value)
    _require(
        half is None,
        f"{place}: {name} has half a character at {half and half.start() + 1}: write it as UTF-8",
    )
    return str(value)


def _require(holds: object, message: str) -> None:
    if not holds:
        raise GatesError(message)


def _kind(value: Any) -> str:
    """Return what a value of a file is, in words."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return "missing" if value is None else "empty"
    kinds = {bool: "true or false", int: "an integer", float: "a number", str: "text"}
    return {**kinds, list: "a list", dict: "an object"}.get(type(value), type(value).__name__)


def _record(row: Row) -> dict[str, Any]:
    """Return a row as the official files have it."""
    record: dict[str, Any] = {
        "id": row.id,
        "context": json.loads(row.context) if row.task == "mf" else row.context,
        "multi_turns": [_turn_record(turn) for turn in row.turns],
        **row.extra,
    }
    added = {"origin": row.origin, "new_tokens": row.new_tokens}
    return {**record, **{n: value for n, value in added.items() if value not in (None, "file")}}


def _turn_record(turn: Turn) -> dict[str, Any]:
    """Return a turn as the official files have it."""
    answer = list(turn.answer) if isinstance(turn.answer, tuple) else turn.answer
    record = {
        "input": turn.input,
        "answer": answer,
        "options": list(turn.options) or None,
        "task": turn.task and PREFIX + turn.task,
        "depth": turn.depth,
        **turn.extra,
    }
    return {name: value for name, value in record.items() if value is not None}
