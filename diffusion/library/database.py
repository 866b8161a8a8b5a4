"""The index: a SQLite file, embeddings in a file next to it, and what both hold of adapters."""

import difflib
import fcntl
import hashlib
import json
import math
import os
import sqlite3
import threading
import unicodedata
import urllib.parse
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import count, filterfalse
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffusion.library.paths import Found, LibraryError, Refused, shown, unique_name
from diffusion.library.record import READER, REASONS, Adapter, Filters, WeightEncoder
from diffusion.lora_file.container import clean, listed

VERSION = 2

TABLES = """
DROP TABLE IF EXISTS adapter;
DROP TABLE IF EXISTS tag;
DROP TABLE IF EXISTS module;
DROP TABLE IF EXISTS words;
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
CREATE TABLE IF NOT EXISTS matrix (
    fingerprint TEXT PRIMARY KEY, dim INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS encoding (
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
encodings; one without a row is a refusal. An older index keeps them, its files are read again."""

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
                    " or name the folder by --folder, or its index by --index"
                )
            self.writable = create or os.access(folder, os.W_OK)
            path, log = folder / FILE, folder / f"{FILE}-wal"
            logged = log.exists() and log.stat().st_size
            mode = "rwc" if self.writable else "ro" if logged else "ro&immutable=1"
            self._connection = sqlite3.connect(
                f"file:{urllib.parse.quote(os.fsencode(path.absolute()))}?mode={mode}",
                uri=True,
                timeout=BUSY,
                isolation_level=None,
                check_same_thread=False,
            )
            weakref.finalize(self, self._connection.close)
            self._connection.row_factory = sqlite3.Row
            self._connection.create_function("fold", 1, str.casefold, deterministic=True)
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
        """Run a statement within `writing`."""
        return self._connection.execute(sql, values)

    def run_many(self, sql: str, values: Iterable[Sequence[Any]]) -> sqlite3.Cursor:
        """Run a statement for each of some rows, within `writing`."""
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

    def _prepare(self) -> None:
        """Make the tables; a lock on a file, since a change to WAL does not wait for others."""
        with (self.folder / LOCK).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
            if self.one("PRAGMA user_version")[0] < VERSION:
                script = f"BEGIN IMMEDIATE; {TABLES} PRAGMA user_version = {VERSION}; COMMIT;"
                self._connection.executescript(script)

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


class Catalog:
    """What an index holds.

    Args:
        folder: Of the index.
        create: Make it where it is missing.

    Raises:
        LibraryError: It is missing, damaged, of another version, or cannot be written.
    """

    def __init__(self, folder: Path, *, create: bool) -> None:
        self.folder = folder
        self.database = Database(folder, create=create)

    def is_unchanged(self, found: Found) -> bool:
        """Return whether a file is as it was read; of one that failed, permissions count, too."""
        row = self.database.one(
            "SELECT 1 FROM adapter WHERE location = :location AND size = :size AND mtime_ns = "
            f":mtime_ns AND config = :config AND reader = {READER} AND "
            "(error = '' OR ctime_ns = :ctime_ns)",
            found._asdict(),
        )
        return row is not None

    def record(self, sha256: str) -> dict[str, Any] | None:
        """Return the columns of a file that could be read, by its SHA-256."""
        query = (
            "SELECT a.*, m.name AS layers FROM adapter a JOIN module m ON m.id = a.modules "
            "WHERE sha256 = ? AND error = '' AND reader = ? LIMIT 1"
        )
        row = self.database.one(query, (sha256, READER))
        return None if row is None else dict(row)

    def adapters(self, condition: str = "1", values: Values = ()) -> list[Adapter]:
        """Return the adapters whose row ``a`` meets a condition, in the order of their ids."""
        rows = self.database.all(f"SELECT * FROM adapter a WHERE {condition} ORDER BY id", values)
        return [Adapter.of(row) for row in rows]

    def among(self, column: str, values: Sequence[Any]) -> list[Adapter]:
        """Return the adapters with one of some values in a column."""
        wanted = (json.dumps(values),)
        return self.adapters(f"{column} IN (SELECT value FROM json_each(?))", wanted)

    def find(self, name: str) -> Adapter:
        """Return an adapter by its name, or by its path below the root.

        Raises:
            LibraryError: There is none; the message names similar ones.
        """
        found = self.adapters("name = ?", (unicodedata.normalize("NFC", clean(name)),))
        with suppress(UnicodeEncodeError):  # no file has such a name
            found += self.adapters("location = ?", (os.fsencode(name),))
        if found:
            return found[0]
        known = [row[0] for row in self.database.all("SELECT name FROM adapter LIMIT 10000")]
        none = "scan the folder of the library first"
        hint = f"there are {listed(sorted(known), 10)}" if known else none
        near = " or ".join(difflib.get_close_matches(name, known))
        hint = f"did you mean {near}?" if near else hint
        raise LibraryError(f"the library has no adapter {clean(name, 200)!r}: {hint}")

    def candidates(self, family: str) -> list[tuple[Adapter, dict[str, float]]]:
        """Return the adapters of a family that change something, with ‖ΔW‖ of each layer."""
        names = {one: json.loads(text) for one, text in self.database.all("SELECT * FROM module")}
        condition = "family = ? AND searchable AND norm > 0 ORDER BY id"
        rows = self.database.all(f"SELECT * FROM adapter WHERE {condition}", (family,))
        norms = [
            dict(zip(names[row["modules"]], np.frombuffer(row["norms"]).tolist(), strict=True))
            for row in rows
        ]
        return list(zip(map(Adapter.of, rows), norms, strict=True))

    def holding(
        self, words: Sequence[str], filters: Filters, flagged: bool, of: str = ""
    ) -> dict[int, float]:
        """Return the fraction of words that metadata of adapters hold, by id, the largest first.

        Args:
            words: Without quotes.
            filters: That adapters pass.
            flagged: Whether adapters count that no search by weights may return.
            of: Columns that are searched, such as ``{title name} :``; all if empty.
        """
        condition, values = filters.sql()
        query = (
            f"SELECT a.id, -bm25(words, {', '.join(map(str, WORD_WEIGHTS))}) FROM words "
            "JOIN adapter a ON a.id = words.rowid "
            f"WHERE words MATCH :query AND (a.searchable OR {flagged:d}) AND {condition}"
        )
        held: dict[int, list[float]] = {}
        for word in words:
            for identity, score in self.database.all(query, values | {"query": f'{of} "{word}"'}):
                held.setdefault(identity, []).append(score)
        order = sorted(held, key=lambda one: (-len(held[one]), -math.fsum(held[one]), one))
        return {identity: len(held[identity]) / len(words) for identity in order}

    def repeated(self) -> list[tuple[str, str]]:
        """Return the path of each file with the content of an earlier one, and that one's path."""
        pairs = self.database.all(
            "SELECT a.location, b.location FROM adapter a JOIN adapter b ON b.id = (SELECT MIN(id) "
            "FROM adapter WHERE digest = a.digest) WHERE a.digest <> '' AND b.id < a.id "
            "ORDER BY a.id"
        )
        return [(shown(own), shown(first)) for own, first in pairs]

    def keep(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write the records of files, in place of earlier ones of the same locations."""
        words = "title, triggers, tags, text, name"
        with self.database.writing():
            for record in map(dict, records):
                location, layers = (record["location"],), (record.pop("layers"),)
                self.database.run("INSERT OR IGNORE INTO module (name) VALUES (?)", layers)
                module = self.database.one("SELECT id FROM module WHERE name = ?", layers)
                old = self.database.one("SELECT id, name FROM adapter WHERE location = ?", location)
                own, name = old or (None, unique_name(*location))
                record |= {"id": own, "name": name, "modules": module["id"]}
                self.database.run("DELETE FROM adapter WHERE location = ?", location)
                columns = f"({', '.join(record)}) VALUES (:{', :'.join(record)})"
                done = self.database.run(f"INSERT INTO adapter {columns}", record)
                self.database.run(
                    "INSERT OR IGNORE INTO tag SELECT fold(t.value), a.id FROM adapter a, "
                    "json_each(a.tags) t WHERE a.id = ?",
                    (done.lastrowid,),
                )
                self.database.run(
                    f"INSERT INTO words (rowid, {words}) SELECT id, {words} FROM adapter "
                    "WHERE error = '' AND location = ?",
                    location,
                )

    def keep_encodings(
        self, matrix: Matrix, fingerprint: str, encoded: Mapping[str, Vectors | str]
    ) -> None:
        """Write embeddings: first their rows of the matrix, then what names them.

        Args:
            matrix: Of the encoder.
            fingerprint: Of the encoder.
            encoded: Digest of a content -> its embedding, or why it was refused.

        Raises:
            LibraryError: The index holds embeddings of another size.
        """
        own = (fingerprint,)
        with self.database.writing():
            self.database.run(
                "INSERT OR IGNORE INTO matrix (fingerprint, dim) VALUES (?, ?)",
                (fingerprint, matrix.dim),
            )
            dim = self.database.one("SELECT dim FROM matrix WHERE fingerprint = ?", own)[0]
            if dim != matrix.dim:
                raise LibraryError(
                    f"the encoder gives {matrix.dim} numbers, but the index holds {dim} of an "
                    "encoder with the same fingerprint"
                )
            known = dict(
                self.database.all("SELECT digest, row FROM encoding WHERE fingerprint = ?", own)
            )
            new = {digest: one for digest, one in encoded.items() if digest not in known}
            free = filterfalse(set(known.values()).__contains__, count())
            vectors = {digest: one for digest, one in new.items() if not isinstance(one, str)}
            rows = dict(zip(vectors, free, strict=False))
            if rows:
                matrix.write({rows[digest]: vector for digest, vector in vectors.items()})
            self.database.run_many(
                "INSERT INTO encoding (fingerprint, digest, row, refusal) VALUES (?, ?, ?, ?)",
                [
                    (fingerprint, digest, rows.get(digest), one if isinstance(one, str) else "")
                    for digest, one in new.items()
                ],
            )

    def pending(self, encoder: WeightEncoder, lenient: bool) -> list[Adapter]:
        """Return an adapter for each content that an encoder has not seen."""
        found = self.adapters(
            "searchable AND family = ? AND (? OR problem = '') AND "
            "digest NOT IN (SELECT digest FROM encoding WHERE fingerprint = ?)",
            (encoder.family, lenient, encoder.fingerprint),
        )
        first = {one.digest: one for one in reversed(found)}
        return sorted(first.values(), key=lambda one: one.id)

    def unencoded(self, encoder: WeightEncoder, lenient: bool) -> Iterator[Refused]:
        """Yield the files that an encoder has not encoded, and why."""
        query = (
            "SELECT a.*, COALESCE(e.refusal, '') AS refusal FROM adapter a LEFT JOIN encoding e "
            "ON e.digest = a.digest AND e.fingerprint = ? WHERE error = '' AND e.row IS NULL "
            "ORDER BY id"
        )
        for row in self.database.all(query, (encoder.fingerprint,)):
            one, served = Adapter.of(row), encoder.family
            reasons = [REASONS[flag] for flag in one.flags if flag in REASONS]
            if one.family != served:
                reasons = [
                    f"it is for {one.family or 'unknown models'}, the encoder serves {served}"
                ]
            if one.problem and not lenient:
                reasons.append(one.problem)
            yield Refused(one.path, row["refusal"] or "; ".join(reasons) or "it has changed")

    def forget(self, locations: Iterable[bytes]) -> int:
        """Remove files from the index, and return how many there were."""
        with self.database.writing():
            query, values = "DELETE FROM adapter WHERE location = ?", [(one,) for one in locations]
            return self.database.run_many(query, values).rowcount

    def drop_unused(self, family: str, fingerprint: str) -> None:
        """Remove embeddings that no file has, and those of another encoder of the family."""
        self._drop(
            "fingerprint <> ? AND digest IN (SELECT digest FROM adapter WHERE family = ?) OR "
            "digest NOT IN (SELECT digest FROM adapter)",
            (fingerprint, family),
        )

    def drop_lost(self, matrix: Matrix, fingerprint: str) -> None:
        """Remove embeddings whose rows are not in the file any more, so that they are made."""
        self._drop("fingerprint = ? AND row >= ?", (fingerprint, len(matrix)))

    def _drop(self, condition: str, values: Values) -> None:
        """Remove encodings, and the files of encoders that have none left."""
        if not self.database.one(f"SELECT 1 FROM encoding WHERE {condition}", values):
            return
        left = "fingerprint NOT IN (SELECT fingerprint FROM encoding)"
        with self.database.writing():
            self.database.run(f"DELETE FROM encoding WHERE {condition}", values)
            empty = self.database.all(f"SELECT fingerprint, dim FROM matrix WHERE {left}")
            self.database.run(f"DELETE FROM matrix WHERE {left}")
            for name, dim in empty:
                Matrix(self.folder, name, dim).path.unlink(missing_ok=True)
