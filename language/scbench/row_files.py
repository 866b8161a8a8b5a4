"""Files of SCBench: JSON lines or Parquet, as they were published, read, checked and written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from core_gates.errors import GatesError, MissingExtraError, check_option
from harness.files import replacing
from harness.files.texts import read_utf8, unreadable
from language.scbench.row import PREFIX, TASKS, Answer, Origin, Row, Turn

CONFIGS = (PREFIX, "multi_turn_")
"""What precedes the name of a task in the names of files and folders; the second is the older."""

OPTIONS = 4
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
            if row.id in rows:
                raise GatesError(
                    f"{place}: id {row.id} is that of an earlier row: give each row its own, or"
                    " none of them an id"
                )
            rows[row.id] = row
    if not rows:
        raise GatesError(f"{path} holds no rows: get the file of {PREFIX}{task} again")
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
            for pattern in (name, f"data/{name}"):
                if paths := sorted(folder.glob(pattern)):
                    found[pattern] = paths
    if not found:
        raise GatesError(
            f"{folder} has neither {PREFIX}{task}.jsonl nor {PREFIX}{task}/test-*.parquet: give the"
            " folder of a copy of microsoft/SCBench"
        )
    if len(found) > 1:
        first, second = (paths[0] for paths in list(found.values())[:2])
        raise GatesError(f"{first} and {second} are both of {task}: remove one of them")
    paths = next(iter(found.values()))
    parts = paths[0].stem.rpartition("-of-")[2]
    if parts.isdigit() and len(paths) != int(parts):
        raise GatesError(f"{paths[0]} is one of {int(parts)} parts, {len(paths)} found: get all")
    return paths


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
    """Yield place and content of each row, which lacks the fields that are null."""
    pa, pq = _pyarrow()
    number = 0
    try:
        path.open("rb").close()
    except OSError as error:
        raise unreadable(path, error) from error
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
    if not isinstance(record, dict):
        raise GatesError(f"{place}: it is {_kind(record)}, expected an object with a context")
    record = {name: value for name, value in record.items() if value is not None}
    turns = record.get("multi_turns")
    if not isinstance(turns, list) or not turns:
        raise GatesError(
            f"{place}: multi_turns is {'empty' if turns == [] else _kind(turns)}, expected a list"
            " of at least one question"
        )
    identity = record.get("id", number)
    if isinstance(identity, bool) or not isinstance(identity, int):
        raise GatesError(f"{place}: id is {_kind(identity)}, expected an integer")
    origin, new_tokens = record.get("origin", "file"), record.get("new_tokens")
    if origin not in get_args(Origin):
        raise GatesError(f"{place}: origin is {origin!r}, expected {' or '.join(get_args(Origin))}")
    if new_tokens is not None and not (isinstance(new_tokens, int) and new_tokens > 0):
        raise GatesError(f"{place}: new_tokens is {new_tokens!r}, expected a positive integer")
    extra = {name: value for name, value in record.items() if name not in ROW_FIELDS}
    if "repoqa" in (task, *TASKS[task].parts):
        for name in ("lang", "repo"):
            _text(extra.get(name), name, place)
    return Row(
        task,
        identity,
        _context(record, task, place),
        tuple(_turn(turn, task, f"{place}, turn {n}") for n, turn in enumerate(turns, 1)),
        extra,
        origin,
        new_tokens,
    )


def _context(record: Mapping[str, Any], task: str, place: str) -> str:
    """Return the context of a row; numbers as Python prints a list of them."""
    name = "context" if "context" in record else "input"
    context = record.get(name)
    if task != "mf":
        return _text(context, "context", place)
    if not isinstance(context, list) or not context or any(type(n) is not int for n in context):
        raise GatesError(
            f"{place}: context is {_kind(context)}, expected a list of integers for Math.Find"
        )
    return str(context)


def _turn(turn: Any, task: str, place: str) -> Turn:
    """Return a turn that is whole."""
    if not isinstance(turn, dict):
        raise GatesError(f"{place}: it is {_kind(turn)}, expected an object with input and answer")
    turn = {name: value for name, value in turn.items() if value is not None}
    part: str | None = None
    if parts := TASKS[task].parts:
        part = _text(turn.get("task"), "task", place).removeprefix(PREFIX)
        if part not in parts:
            names = f" or {PREFIX}".join(parts)
            raise GatesError(f"{place}: task is {part!r}, expected {PREFIX}{names}")
    extra = {name: value for name, value in turn.items() if name not in TURN_FIELDS}
    if (part or task) == "repoqa":
        _text(extra.get("name"), "name", place)
    depth = turn.get("depth")
    if depth is not None and not (isinstance(depth, (int, float)) and 0 <= depth <= 1):
        raise GatesError(f"{place}: depth is {depth!r}, expected a number from 0 to 1")
    answer, options = _answer(turn.get("answer"), part or task, place), turn.get("options", [])
    if not isinstance(options, list):
        raise GatesError(f"{place}: options is {_kind(options)}, expected a list")
    options = tuple(_text(option, "an option", place) for option in options)
    if task == "choice_eng" and (len(options) != OPTIONS or answer not in options):
        raise GatesError(
            f"{place}: {len(options)} options, {'with' if answer in options else 'without'} the"
            f" answer, expected {OPTIONS} with the answer"
        )
    return Turn(_text(turn.get("input"), "input", place), answer, options, part, depth, extra)


def _answer(answer: Any, task: str, place: str) -> Answer:
    """Return an answer: an integer of Math.Find, names of Retr.MultiHop, otherwise text."""
    if answer is None or answer in ("", []):
        raise GatesError(f"{place} has no answer: get the file again, nothing can be scored")
    if task == "mf":
        number = answer[0] if isinstance(answer, list) and len(answer) == 1 else answer
        if isinstance(number, float) and number.is_integer():
            return int(number)
        if type(number) is not int:
            raise GatesError(f"{place}: answer is {_kind(answer)}, expected an integer")
        return number
    if isinstance(answer, list):
        return tuple(_text(text, "an answer", place) for text in answer)
    if task == "vt":
        raise GatesError(f"{place}: answer is {_kind(answer)}, expected a list of names")
    return _text(answer, "answer", place)


def _text(value: Any, name: str, place: str) -> str:
    """Return what must be text that is not empty."""
    if not isinstance(value, str) or not value:
        raise GatesError(f"{place}: {name} is {_kind(value)}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise GatesError(
            f"{place}: {name} has half a character at {error.start + 1}: write the file as UTF-8"
        ) from error
    return value


def _kind(value: Any) -> str:
    """Return what a value of a file is, in words."""
    if value is None or value == "":
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
