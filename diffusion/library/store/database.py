"""The SQLite file of an index: opened, locked, and its errors told in one line."""

import fcntl
import os
import sqlite3
import threading
import urllib.parse
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusion.library.errors import LibraryError
from diffusion.library.store.schema import TABLES, VERSION
from diffusion.lora_file.container import clean

FILE, LOCK = "index.sqlite", "index.lock"
BUSY = 60.0
"""Seconds that a process waits for another one that writes."""

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
