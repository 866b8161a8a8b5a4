"""The index on the disk: a SQLite file, and embeddings in a file next to it, mapped into memory."""

import fcntl
import hashlib
import os
import sqlite3
import threading
import urllib.parse
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from diffusion.library.paths import LibraryError
from diffusion.lora_file.container import clean

VERSION = 1

TABLES = """
CREATE TABLE adapter (
    id INTEGER PRIMARY KEY,
    location BLOB NOT NULL UNIQUE,
    name TEXT NOT NULL UNIQUE,
    size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    ctime_ns INTEGER NOT NULL,
    config TEXT NOT NULL,
    reader INTEGER NOT NULL,
    sha256 TEXT NOT NULL,
    digest TEXT NOT NULL,
    family TEXT NOT NULL,
    dialect TEXT NOT NULL,
    rank_min INTEGER NOT NULL,
    rank_mean REAL NOT NULL,
    rank_max INTEGER NOT NULL,
    norm REAL,
    modules BLOB NOT NULL,
    norms BLOB NOT NULL,
    title TEXT NOT NULL,
    triggers TEXT NOT NULL,
    tags TEXT NOT NULL,
    license TEXT NOT NULL,
    text TEXT NOT NULL,
    flags TEXT NOT NULL,
    searchable INTEGER NOT NULL,
    problem TEXT NOT NULL,
    error TEXT NOT NULL
);
CREATE INDEX adapter_sha256 ON adapter (sha256);
CREATE INDEX adapter_digest ON adapter (digest);
CREATE TABLE tag (
    tag TEXT NOT NULL,
    adapter INTEGER NOT NULL,
    PRIMARY KEY (tag, adapter)
) WITHOUT ROWID;
CREATE INDEX tag_adapter ON tag (adapter);
CREATE TABLE module (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE matrix (fingerprint TEXT PRIMARY KEY, dim INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE encoding (
    fingerprint TEXT NOT NULL,
    digest TEXT NOT NULL,
    row INTEGER,
    refusal TEXT NOT NULL,
    PRIMARY KEY (fingerprint, digest),
    UNIQUE (fingerprint, row)
) WITHOUT ROWID;
CREATE VIRTUAL TABLE words USING fts5 (
    title, triggers, tags, text, name, tokenize = 'porter unicode61 remove_diacritics 2'
);
"""
"""``modules`` and ``norms`` hold 32-bit ids and float64 numbers, in the order of the ids. Contents,
not files, have encodings; one without a row is a refusal."""

COLUMNS = (
    "location", "name", "size", "mtime_ns", "ctime_ns", "config", "reader", "sha256", "digest",
    "family", "dialect", "rank_min", "rank_mean", "rank_max", "norm", "modules", "norms", "title",
    "triggers", "tags", "license", "text", "flags", "searchable", "problem", "error",
)  # fmt: skip
"""Of an adapter, without its id."""

WORD_COLUMNS = ("title", "triggers", "tags", "text", "name")
WORD_WEIGHTS = (4.0, 4.0, 2.0, 1.0, 2.0)  # of the columns of `words` in BM25


FILE, LOCK = "index.sqlite", "index.lock"
BUSY = 60.0  # seconds that a process waits for another one that writes

_PARAMETERS = 500


class Database:
    """A connection, which threads may share.

    Args:
        folder: Of the index.
        create: Make it where it is missing.

    Raises:
        LibraryError: It is missing, damaged, of another version, or cannot be written.
    """

    def __init__(self, folder: Path, *, create: bool) -> None:
        self.folder, self.label = folder, clean(str(folder), 200)
        self._lock = threading.RLock()
        self._commits = 0
        with self._errors():
            if create:
                folder.mkdir(parents=True, exist_ok=True)
            elif not (folder / FILE).is_file():
                raise LibraryError(
                    f"there is no index in {self.label}: run `gates diffusion index FOLDER` first,"
                    " or name its index"
                )
            self.writable = create or os.access(folder, os.W_OK)
            self._connection = self._connect()
            weakref.finalize(self, self._connection.close)
            if self.writable:
                self._prepare()
            version = self.one("PRAGMA user_version")[0]
        if version != VERSION:
            raise LibraryError(
                f"the index {self.label} is of version {version}, expected {VERSION}: remove it "
                "and index the library again"
            )

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def version(self) -> tuple[int, int]:
        """Return a value that changes with every commit of any process."""
        return self.one("PRAGMA data_version")[0], self._commits

    def all(self, sql: str, values: Sequence[Any] | dict[str, Any] = ()) -> list[Any]:
        """Return all rows of a query."""
        with self._lock, self._errors():
            return self._connection.execute(sql, values).fetchall()

    def one(self, sql: str, values: Sequence[Any] | dict[str, Any] = ()) -> Any:
        """Return the first row of a query; None if there is none."""
        with self._lock, self._errors():
            return self._connection.execute(sql, values).fetchone()

    def run(self, sql: str, values: Sequence[Any] = ()) -> int:
        """Run a statement within :meth:`writing`, and return the id of the row it inserts."""
        return self._connection.execute(sql, values).lastrowid or 0

    def run_many(self, sql: str, values: Iterable[Sequence[Any]]) -> None:
        """Run a statement for each of some rows, within :meth:`writing`."""
        self._connection.executemany(sql, values)

    def of_many(self, sql: str, values: Sequence[Any]) -> list[Any]:
        """Return the rows of a query with ``{}`` for any number of values."""
        rows = []
        for start in range(0, len(values), _PARAMETERS):
            part = values[start : start + _PARAMETERS]
            rows += self.all(sql.format(", ".join("?" * len(part))), part)
        return rows

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Commit what the block does as a whole; other processes that write wait.

        Raises:
            LibraryError: The index cannot be written.
        """
        if not self.writable:
            raise LibraryError(f"the index {self.label} cannot be written: name another one")
        with self._lock, self._errors():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
            self._commits += 1

    def _connect(self) -> sqlite3.Connection:
        path = self.folder / FILE
        mode = "rwc"
        if not self.writable:
            log = path.with_name(f"{FILE}-wal")
            mode = "ro" if log.exists() and log.stat().st_size else "ro&immutable=1"
        connection = sqlite3.connect(
            f"file:{urllib.parse.quote(os.fsencode(path.absolute()))}?mode={mode}",
            uri=True,
            timeout=BUSY,
            isolation_level=None,
            check_same_thread=False,
        )
        connection.create_function("fold", 1, str.casefold, deterministic=True)
        return connection

    def _prepare(self) -> None:
        """Make the tables; a lock on a file, since a change to WAL does not wait for others."""
        connection = self._connection
        with (self.folder / LOCK).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            if connection.execute("PRAGMA user_version").fetchone()[0] == 0:
                script = f"BEGIN IMMEDIATE; {TABLES} PRAGMA user_version = {VERSION}; COMMIT;"
                connection.executescript(script)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            text = clean(str(error), 200)
            if "locked" in text or "busy" in text:
                reason = "another process writes it: try again when it is done"
            elif "fts5" in text:
                reason = "this SQLite lacks FTS5: install a Python with it"
            else:
                reason = f"{text}: name another index, or remove it and index the library again"
            raise LibraryError(f"the index {self.label} cannot be used: {reason}") from error
        except sqlite3.DatabaseError as error:
            raise LibraryError(
                f"the index {self.label} is damaged: {clean(str(error), 200)}: remove it and index "
                "the library again"
            ) from error
        except OSError as error:
            raise LibraryError(
                f"the index {self.label} cannot be used: {error.strerror}: name another folder"
            ) from error


Vectors = NDArray[np.float32]


class Matrix:
    """float32 numbers (rows, dim) without a header; the index knows which rows are in use.

    Rows are written and flushed to the disk before the index names them, and only rows that it does
    not name are written. What a killed process leaves is therefore never read.

    Args:
        folder: Of the index.
        fingerprint: Of the encoder.
        dim: Numbers of a row.
    """

    def __init__(self, folder: Path, fingerprint: str, dim: int) -> None:
        self.path = folder / file_name(fingerprint)
        self.dim = dim

    def __len__(self) -> int:
        """Return the number of rows that are whole."""
        try:
            return self.path.stat().st_size // (4 * self.dim)
        except FileNotFoundError:
            return 0

    def write(self, rows: Mapping[int, Vectors]) -> None:
        """Write rows, and return when the disk has them."""
        created = not self.path.exists()
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            for row, vector in rows.items():
                raw = vector.astype("<f4").tobytes()
                place, done = row * 4 * self.dim, 0
                while done < len(raw):
                    done += os.pwrite(descriptor, raw[done:], place + done)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if created:
            _flush_folder(self.path.parent)

    def view(self) -> Vectors:
        """Return all rows (rows, dim), read-only and read from the disk on demand."""
        if not len(self):
            return np.empty((0, self.dim), np.float32)
        mapped = np.memmap(self.path, "<f4", "r", shape=(len(self), self.dim))
        return np.asarray(mapped)


def file_name(fingerprint: str) -> str:
    """Return the name of the file for an encoder."""
    return f"embeddings-{hashlib.sha256(fingerprint.encode()).hexdigest()[:16]}.f32"


def unit_vector(vector: Tensor, dim: int) -> Vectors:
    """Return an embedding as float32 numbers (dim,) of unit length.

    Raises:
        LibraryError: It has another size, is not finite, or is zero.
    """
    values = vector.detach().double().cpu().numpy()
    length = float(np.linalg.norm(values))
    if values.shape != (dim,) or not np.isfinite(length) or length == 0:
        raise LibraryError(
            f"an encoder gives a vector of shape {values.shape} and length {length:g}, expected "
            f"({dim},) and 1: choose another encoder"
        )
    return (values / length).astype(np.float32)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
