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

VERSION = 2

TABLES = """
CREATE TABLE adapter (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    location BLOB NOT NULL UNIQUE,
    size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    ctime_ns INTEGER NOT NULL,
    config TEXT NOT NULL,
    reader INTEGER NOT NULL,
    sha256 TEXT NOT NULL DEFAULT '',
    digest TEXT NOT NULL DEFAULT '',
    family TEXT NOT NULL DEFAULT '',
    dialect TEXT NOT NULL DEFAULT '',
    ranks TEXT NOT NULL DEFAULT '[0, 0.0, 0]',
    norm REAL DEFAULT 0,
    modules INTEGER NOT NULL,
    norms BLOB NOT NULL DEFAULT x'',
    title TEXT NOT NULL DEFAULT '',
    triggers TEXT NOT NULL DEFAULT '[]',
    tags TEXT NOT NULL DEFAULT '[]',
    license TEXT NOT NULL DEFAULT '',
    text TEXT NOT NULL DEFAULT '',
    flags TEXT NOT NULL DEFAULT '[]',
    searchable INTEGER NOT NULL DEFAULT 0,
    problem TEXT NOT NULL DEFAULT '',
    error TEXT NOT NULL DEFAULT ''
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
CREATE TRIGGER unlist AFTER DELETE ON adapter BEGIN
    DELETE FROM tag WHERE adapter = old.id;
    DELETE FROM words WHERE rowid = old.id;
END;
"""
"""Lists are JSON. ``modules`` is the id of a row of ``module``, which holds the names of all layers
of a file as one list; ``norms`` are float64 numbers in their order. Contents, not files, have
encodings; one without a row is a refusal."""

WORD_WEIGHTS = (4.0, 4.0, 2.0, 1.0, 2.0)  # of title, triggers, tags, text and name in BM25


FILE, LOCK = "index.sqlite", "index.lock"
_WAIT = "another process writes it: try again when it is done"
_REASONS = {
    "locked": _WAIT,
    "busy": _WAIT,
    "fts5": "this SQLite lacks FTS5: install a Python with it",
}  # words of errors, and what they mean
BUSY = 60.0  # seconds that a process waits for another one that writes


Values = Sequence[Any] | Mapping[str, Any]


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
        return self.one("PRAGMA data_version")[0], self._connection.total_changes

    def all(self, sql: str, values: Values = ()) -> list[Any]:
        """Return all rows of a query."""
        with self._lock, self._errors():
            return self._connection.execute(sql, values).fetchall()

    def one(self, sql: str, values: Values = ()) -> Any:
        """Return the first row of a query; None if there is none."""
        with self._lock, self._errors():
            return self._connection.execute(sql, values).fetchone()

    def run(self, sql: str, values: Values = ()) -> sqlite3.Cursor:
        """Run a statement within :meth:`writing`."""
        return self._connection.execute(sql, values)

    def run_many(self, sql: str, values: Iterable[Sequence[Any]]) -> sqlite3.Cursor:
        """Run a statement for each of some rows, within :meth:`writing`."""
        return self._connection.executemany(sql, values)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Commit what the block does as a whole; other processes that write wait.

        Raises:
            LibraryError: The index cannot be written.
        """
        if not self.writable:
            raise LibraryError(f"the index {self.label} cannot be written: name another one")
        with self._lock, self._errors(), self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            yield

    def _connect(self) -> sqlite3.Connection:
        path, log = self.folder / FILE, self.folder / f"{FILE}-wal"
        logged = log.exists() and log.stat().st_size
        mode = "rwc" if self.writable else "ro" if logged else "ro&immutable=1"
        connection = sqlite3.connect(
            f"file:{urllib.parse.quote(os.fsencode(path.absolute()))}?mode={mode}",
            uri=True,
            timeout=BUSY,
            isolation_level=None,
            check_same_thread=False,
        )
        connection.row_factory = sqlite3.Row
        connection.create_function("fold", 1, str.casefold, deterministic=True)
        return connection

    def _prepare(self) -> None:
        """Make the tables; a lock on a file, since a change to WAL does not wait for others."""
        connection = self._connection
        with (self.folder / LOCK).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            if connection.execute("PRAGMA user_version").fetchone()[0] == 0:
                script = f"BEGIN IMMEDIATE; {TABLES} PRAGMA user_version = {VERSION}; COMMIT;"
                connection.executescript(script)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.DatabaseError, OSError) as error:
            usable = isinstance(error, sqlite3.OperationalError | OSError)
            text = clean(getattr(error, "strerror", None) or str(error), 200)
            other = f"{text}: name another index, or remove it and index the library again"
            reason = next((why for word, why in _REASONS.items() if word in text), other)
            what = "cannot be used" if usable else "is damaged"
            raise LibraryError(f"the index {self.label} {what}: {reason}") from error


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
        name = hashlib.sha256(fingerprint.encode()).hexdigest()[:16]
        self.path = folder / f"embeddings-{name}.f32"
        self.dim = dim

    def __len__(self) -> int:
        """Return the number of rows that are whole."""
        try:
            return self.path.stat().st_size // (4 * self.dim)
        except FileNotFoundError:
            return 0

    def write(self, rows: Mapping[int, Vectors]) -> None:
        """Write rows, and return when the disk has them."""
        self.path.touch()
        with self.path.open("r+b") as file:
            for row, vector in rows.items():
                raw, done = vector.astype("<f4").tobytes(), 0
                while done < len(raw):
                    done += os.pwrite(file.fileno(), raw[done:], row * len(raw) + done)
            os.fsync(file.fileno())
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def view(self) -> Vectors:
        """Return all rows (rows, dim), read-only and read from the disk on demand."""
        if not (rows := len(self)):
            return np.empty((0, self.dim), np.float32)
        return np.asarray(np.memmap(self.path, "<f4", "r", shape=(rows, self.dim)))


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
