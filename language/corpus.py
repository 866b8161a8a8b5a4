"""Documents of files, folders, JSON lines, Parquet, or of Python's standard library."""

from __future__ import annotations

import json
import os
import re
import sysconfig
from collections.abc import Collection, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple

from core_gates.errors import GatesError
from language.tokenizer import utf8

PYTHON = "python"
FIELD = "text"
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
HELD_OUT = 10
"""Percent of the documents that are for validation, and as many for the test."""

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data"}
"""Folders left out of the corpus of Python's standard library."""
SITE = {"sitecustomize.py", "usercustomize.py"}  # of a machine, not of Python
GENERATED = re.compile(
    r"\bauto-?generated|\b(is|was)( automatically)? generated|generated (from '|and used)",
    re.IGNORECASE,
)
HEAD = 200  # letters at the beginning of a file, in which its generator is named


class Document(NamedTuple):
    """A text.

    Attributes:
        name: Path of its file, relative to the folder that was named; of a line of a JSON file or a
            row of a table, their number follows a colon, counted from 1.
        text: What it holds, never empty.
    """

    name: str
    text: str


class Corpus:
    """Documents in memory, in the order of their sources and, within a folder, of their names.

    The SHA-256 of a name alone decides the split of a document: 80 % are for training, 10 % for
    validation and 10 % for the test. A file that is added or removed moves no other; lines and rows
    are named by their number, so that one that is inserted moves those after it.

    Args:
        documents: The documents, names unique.
        duplicates: Documents that were dropped because another one has the same bytes.
        skipped: Files of folders that were passed over: number of ``links``, of ``binary`` ones,
            which are no UTF-8 or contain a zero byte, and of ``empty`` ones.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        duplicates: int = 0,
        skipped: Mapping[str, int] | None = None,
    ) -> None:
        self.documents, self.duplicates = list(documents), duplicates
        self.skipped = dict(skipped or {})

    @property
    def digest(self) -> str:
        """Hexadecimal SHA-256 of names and texts, whatever their order."""
        total = sha256()
        for name, text in sorted(self.documents):
            total.update(sha256(os.fsencode(name)).digest() + sha256(text.encode()).digest())
        return total.hexdigest()

    @staticmethod
    def split(name: str) -> Split:
        """Return the split of the document of a name."""
        percent = int.from_bytes(sha256(os.fsencode(name)).digest()[:8], "big") % 100
        return SPLITS[(percent < 2 * HELD_OUT) + (percent < HELD_OUT)]

    def part(self, split: Split) -> list[Document]:
        """Return the documents of a split, in order."""
        return [document for document in self.documents if self.split(document.name) == split]


def read_corpus(sources: Sequence[str | Path]) -> Corpus:
    """Read documents; those with the same bytes are kept once.

    Args:
        sources: Files of text, ``.jsonl`` or ``.ndjson`` files with an object per line and
            ``.parquet`` tables, both with a field ``text``, and folders of all these, in which
            hidden files, links and binary files are passed over. ``python`` is the standard library
            of the running interpreter, without tests, generated files and what is installed.

    Where a later source has another document of the same name, the name of its folder precedes it.

    Raises:
        GatesError: A source does not exist, cannot be read, is binary, damaged or a ``.json`` (in
            folders they are text like any other), a line or a row has no text, two documents have
            the same name even so, or there is no text at all.
    """
    skipped = {"links": 0, "binary": 0, "empty": 0}
    documents: dict[str, str] = {}
    seen: set[bytes] = set()
    duplicates = 0
    for source in sources:
        for name, text in _documents(source, skipped):
            if not text:
                skipped["empty"] += 1
                continue
            digest = sha256(text.encode()).digest()
            if digest in seen:
                duplicates += 1
                continue
            if name in documents:
                name = f"{Path(source).resolve().name}/{name}"
            if name in documents:
                raise GatesError(f"two sources hold {name}: name the folder above them instead")
            seen.add(digest)
            documents[name] = text
    if not documents:
        passed = ", ".join(f"{number} {kind}" for kind, number in skipped.items() if number)
        raise GatesError(
            f"the corpus {' '.join(map(str, sources))} holds no text{passed and f' ({passed})'}: "
            "name files or folders of text in UTF-8"
        )
    return Corpus([Document(*item) for item in documents.items()], duplicates, skipped)


def source_files(source: str | Path) -> list[tuple[str, Path]]:
    """Return relative path and place of the files of a source, links and binary files included.

    Raises:
        GatesError: It does not exist.
    """
    if source == PYTHON:
        path = Path(sysconfig.get_path("stdlib"))
        files = [
            file for file in _walk(path, LEFT_OUT) if file.suffix == ".py" and file.name not in SITE
        ]
        return [(file.relative_to(path).as_posix(), file) for file in files]
    path = Path(source)
    if path.is_dir():
        return [(file.relative_to(path).as_posix(), file) for file in _walk(path)]
    if not path.exists():
        raise GatesError(f"the corpus {path} does not exist: name files, folders or {PYTHON!r}")
    return [(path.name, path.resolve())]


def _walk(folder: Path, left_out: Collection[str] = ()) -> Iterator[Path]:
    """Yield all files and links that are not hidden nor in folders left out, in order of names."""

    def refuse(error: OSError) -> None:
        raise _unreadable(Path(error.filename), error) from error

    for place, folders, files in os.walk(folder, onerror=refuse):
        here = Path(place)
        folders[:] = sorted(n for n in folders if not n.startswith(".") and n not in left_out)
        linked = [name for name in folders if (here / name).is_symlink()]
        yield from (here / name for name in sorted(files + linked) if not name.startswith("."))


def _unreadable(path: Path, error: OSError) -> GatesError:
    return GatesError(
        f"{path} cannot be read: {error.strerror or error}; check the file, or leave it out"
    )


def _documents(source: str | Path, skipped: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Yield names and texts of a source, and count what is passed over."""
    named = source != PYTHON and not Path(source).is_dir()
    for name, path in source_files(source):
        if path.is_symlink():
            skipped["links"] += 1
        elif not path.is_file():
            continue  # a pipe or a device has no end
        elif (kind := Path(name).suffix.lower()) == ".json" and named:
            raise GatesError(
                f"{path} is JSON as a whole: give a .jsonl file with an object per line, each with "
                f"a field {FIELD!r}, or rename it to train on its text as it is"
            )
        elif kind in READERS:
            for number, text in READERS[kind](path):
                yield f"{name}:{number}", text
        elif (content := _text(path)) is None and named:
            raise GatesError(f"{path} is binary, not text in UTF-8: convert it, or leave it out")
        elif content is None:
            skipped["binary"] += 1
        elif source != PYTHON or not GENERATED.search(content[:HEAD]):
            yield name, content


def _text(path: Path) -> str | None:
    """Return the text of a file, line ends as they are; None if it is binary."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        return None if b"\0" in content else content.decode()
    except UnicodeDecodeError:
        return None


def _json_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield number and text of each line that is not blank."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _field(line, f"{path}, line {number}")
    except OSError as error:
        raise _unreadable(path, error) from error


def _field(line: bytes, place: str) -> str:
    """Return the text of a line.

    Raises:
        GatesError: The line is not JSON, or has no text.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise GatesError(f"{place} is not JSON ({error}): repair or remove it") from error
    if not isinstance(record, dict) or FIELD not in record:
        raise GatesError(f"{place} has no field {FIELD!r}: give every line an object with one")
    return _checked(record[FIELD], place)


def _checked(text: Any, place: str) -> str:
    """Return what must be text.

    Raises:
        GatesError: It is something else, or holds half a character.
    """
    if not isinstance(text, str):
        raise GatesError(f"{place}: {FIELD} is {type(text).__name__}, expected str; give it text")
    try:
        utf8(text)
    except GatesError as error:
        raise GatesError(f"{place}: {error}") from error
    return text


def _parquet(path: Path) -> Iterator[tuple[int, str]]:
    """Yield number and text of each row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as table:
            if FIELD not in table.schema_arrow.names:
                columns = ", ".join(table.schema_arrow.names)
                raise GatesError(f"{path} has no column {FIELD!r} but {columns}: rename the one")
            for batch in table.iter_batches(batch_size=1024, columns=[FIELD]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield number, _checked(value, f"{path}, row {number}")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise GatesError(f"{path} cannot be read as Parquet ({reason}): check the file") from error


READERS = {".jsonl": _json_lines, ".ndjson": _json_lines, ".parquet": _parquet}
