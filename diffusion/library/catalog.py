"""Rows of the index: written as a whole, in an order that a kill cannot break."""

import difflib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from diffusion.library.database import WORD_WEIGHTS, Database, Matrix, Values, Vectors
from diffusion.library.paths import Found, LibraryError, names_of, shown
from diffusion.library.record import READER, Adapter, Filters, WeightEncoder
from diffusion.lora_file.container import clean

SHOWN = 10  # names of a message


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
        query = (
            "SELECT 1 FROM adapter WHERE location = :location AND size = :size AND mtime_ns = "
            f":mtime_ns AND config = :config AND reader = {READER} AND "
            "(error = '' OR ctime_ns = :ctime_ns)"
        )
        return self.database.one(query, found._asdict()) is not None

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
        query = f"SELECT * FROM adapter a WHERE {condition} ORDER BY id"
        return [Adapter.of(row) for row in self.database.all(query, values)]

    def among(self, column: str, values: Sequence[Any]) -> list[Adapter]:
        """Return the adapters with one of some values in a column."""
        condition = f"{column} IN (SELECT value FROM json_each(?))"
        return self.adapters(condition, (json.dumps(values),))

    def find(self, name: str) -> Adapter:
        """Return an adapter by its name, or by its path below the root.

        Raises:
            LibraryError: There is none; the message names similar ones.
        """
        found = self.adapters("name = ?", (clean(name),))
        with suppress(UnicodeEncodeError):  # no file has such a name
            found += self.adapters("location = ?", (os.fsencode(name),))
        if found:
            return found[0]
        known = [row[0] for row in self.database.all("SELECT name FROM adapter LIMIT 10000")]
        hint = "scan the folder of the library first"
        if near := difflib.get_close_matches(name, known):
            hint = f"did you mean {' or '.join(near)}?"
        elif known:
            hint = f"there are {', '.join(sorted(known)[:SHOWN])}"
            hint += f" and {len(known) - SHOWN} more" if len(known) > SHOWN else ""
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

    def holding(self, words: Sequence[str], filters: Filters, flagged: bool) -> dict[int, float]:
        """Return the fraction of words that the metadata of adapters hold, by id.

        Those that hold none are left out; the largest fraction comes first, then the largest BM25.

        Args:
            words: Without quotes.
            filters: That adapters pass.
            flagged: Whether adapters count that no search by weights may return.
        """
        condition, values = filters.sql()
        query = (
            f"SELECT a.id, -bm25(words, {', '.join(map(str, WORD_WEIGHTS))}) FROM words "
            "JOIN adapter a ON a.id = words.rowid "
            f"WHERE words MATCH :query AND (a.searchable OR :flagged) AND {condition}"
        )
        held: dict[int, list[float]] = {}
        for word in words:
            values |= {"flagged": flagged, "query": f'"{word}"'}
            for identity, score in self.database.all(query, values):
                held.setdefault(identity, []).append(score)
        order = sorted(held, key=lambda one: (-len(held[one]), -math.fsum(held[one]), one))
        return {identity: len(held[identity]) / len(words) for identity in order}

    def repeated(self) -> list[tuple[str, str]]:
        """Return the path of each file with the content of an earlier one, and that one's path."""
        query = (
            "SELECT a.location, b.location FROM adapter a JOIN adapter b ON b.id = (SELECT MIN(id) "
            "FROM adapter WHERE digest = a.digest) WHERE a.digest <> '' AND b.id < a.id "
            "ORDER BY a.id"
        )
        return [(shown(own), shown(first)) for own, first in self.database.all(query)]

    def keep(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write the records of files, in place of earlier ones of the same locations."""
        words = "title, triggers, tags, text, name"
        with self.database.writing():
            for record in map(dict, records):
                location, layers = (record["location"],), (record.pop("layers"),)
                self.database.run("INSERT OR IGNORE INTO module (name) VALUES (?)", layers)
                module = self.database.one("SELECT id FROM module WHERE name = ?", layers)
                old = self.database.one("SELECT id, name FROM adapter WHERE location = ?", location)
                own, name = old or (None, self._name(record["location"]))
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

    def _name(self, location: bytes) -> str:
        """Return a name that no other file has."""
        for name in names_of(location):
            if not self.database.one("SELECT 1 FROM adapter WHERE name = ?", (name,)):
                return name
        raise LibraryError(f"{shown(location)} has the name of another file: rename it")

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
            values = (fingerprint, matrix.dim)
            self.database.run(
                "INSERT OR IGNORE INTO matrix (fingerprint, dim) VALUES (?, ?)", values
            )
            dim = self.database.one("SELECT dim FROM matrix WHERE fingerprint = ?", own)[0]
            if dim != matrix.dim:
                raise LibraryError(
                    f"the encoder gives {matrix.dim} numbers, but the index holds {dim} of an "
                    "encoder with the same fingerprint"
                )
            query = "SELECT digest, row FROM encoding WHERE fingerprint = ?"
            known = dict(self.database.all(query, own))
            new = {digest: one for digest, one in encoded.items() if digest not in known}
            used = set(known.values())
            free = (row for row in count() if row not in used)
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

    def unencoded(self, fingerprint: str) -> list[tuple[Adapter, str]]:
        """Return the adapters without an embedding, each with the refusal of the encoder."""
        rows = self.database.all(
            "SELECT a.*, COALESCE(e.refusal, '') AS refusal FROM adapter a LEFT JOIN encoding e "
            "ON e.digest = a.digest AND e.fingerprint = ? WHERE error = '' AND e.row IS NULL "
            "ORDER BY id",
            (fingerprint,),
        )
        return [(Adapter.of(row), row["refusal"]) for row in rows]

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
