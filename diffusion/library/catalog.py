"""Rows of the index: written as a whole, in an order that a kill cannot break."""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion.library.database import (
    COLUMNS,
    WORD_COLUMNS,
    WORD_WEIGHTS,
    Database,
    Matrix,
    Vectors,
    file_name,
)
from diffusion.library.paths import Found, LibraryError, names_of, shown
from diffusion.library.record import (
    READER,
    REASONS,
    Adapter,
    Candidate,
    Description,
    Filters,
    Record,
)
from diffusion.lora_file.container import clean

_ID, _NORM = np.dtype("<i4"), np.dtype("<f8")


def row_of(record: Record, name: str, number: Callable[[str], int]) -> tuple[Any, ...]:
    """Return the values of a row, in the order of ``COLUMNS``.

    Args:
        record: What it holds.
        name: Of the adapter.
        number: Returns the id of a layer.
    """
    found, told = record.found, record.description
    norms = sorted((number(module), norm) for module, norm in record.norms.items())
    searchable = not record.error and not set(record.flags) & set(REASONS)
    values: dict[str, Any] = {
        "location": found.location,
        "name": name,
        "size": found.size,
        "mtime_ns": found.mtime_ns,
        "ctime_ns": found.ctime_ns,
        "config": found.config,
        "reader": READER,
        "sha256": record.sha256,
        "digest": record.digest,
        "family": record.family,
        "dialect": record.dialect,
        "rank_min": record.ranks[0],
        "rank_mean": record.ranks[1],
        "rank_max": record.ranks[2],
        "norm": record.norm,
        "modules": np.array([n for n, _ in norms], _ID).tobytes(),
        "norms": np.array([norm for _, norm in norms], _NORM).tobytes(),
        "title": told.title,
        "triggers": json.dumps(told.triggers),
        "tags": json.dumps(told.tags),
        "license": told.license,
        "text": told.text,
        "flags": json.dumps(record.flags),
        "searchable": int(searchable),
        "problem": record.problem,
        "error": record.error,
    }
    return tuple(values[column] for column in COLUMNS)


def norms_of(row: Mapping[str, Any]) -> dict[int, float]:
    """Return ‖ΔW‖ of each layer, by the id of the layer."""
    modules, norms = np.frombuffer(row["modules"], _ID), np.frombuffer(row["norms"], _NORM)
    return dict(zip(modules.tolist(), norms.tolist(), strict=True))


def record_of(row: Mapping[str, Any], names: Mapping[int, str]) -> Record:
    """Return the record of a row.

    Args:
        row: By column.
        names: Of layers, by id.
    """
    triggers, tags = (tuple(json.loads(row[column])) for column in ("triggers", "tags"))
    place = (row["location"], Path(), row["size"], row["mtime_ns"], row["ctime_ns"], row["config"])
    return Record(
        Found(*place),
        row["sha256"],
        row["digest"],
        row["family"],
        row["dialect"],
        (row["rank_min"], row["rank_mean"], row["rank_max"]),
        {names[module]: norm for module, norm in norms_of(row).items()},
        Description(row["title"], triggers, tags, row["license"], row["text"]),
        tuple(json.loads(row["flags"])),
        row["problem"],
        row["error"],
    )


def adapter_of(row: Mapping[str, Any]) -> Adapter:
    """Return the adapter of a row, given by column."""
    return Adapter(
        row["id"],
        row["name"],
        shown(row["location"]),
        row["title"] or row["name"],
        row["size"],
        row["family"],
        row["dialect"],
        len(row["modules"]) // _ID.itemsize,
        (row["rank_min"], row["rank_mean"], row["rank_max"]),
        math.nan if row["norm"] is None else row["norm"],
        tuple(json.loads(row["triggers"])),
        tuple(json.loads(row["tags"])),
        row["license"],
        row["text"],
        tuple(json.loads(row["flags"])),
        row["problem"],
        row["error"],
        row["sha256"],
        row["digest"],
    )


_UPSERT = (
    f"INSERT INTO adapter ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))}) "
    "ON CONFLICT (location) DO UPDATE SET "
    + ", ".join(f"{column} = excluded.{column}" for column in COLUMNS if column != "location")
)


_STAMP = "location, size, mtime_ns, config, reader, CASE error WHEN '' THEN 0 ELSE ctime_ns END"


class Encoded(NamedTuple):
    """What an encoder made of a content.

    Attributes:
        digest: Of the content.
        vector: Its embedding; None if it was refused.
        refusal: Why; empty if it was not.
    """

    digest: str
    vector: Vectors | None
    refusal: str = ""


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
        self._columns = ("id", *COLUMNS)
        self._numbers: dict[str, int] = {}

    def unchanged(self, found: Iterable[Found]) -> set[bytes]:
        """Return the locations of files that are as they were when they were read."""
        known = {row[0]: row for row in self.database.all(f"SELECT {_STAMP} FROM adapter")}
        return {one.location for one in found if _same(one, known.get(one.location))}

    def is_unchanged(self, found: Found) -> bool:
        """Return whether a file is as it was when it was read."""
        query = f"SELECT {_STAMP} FROM adapter WHERE location = ?"
        return _same(found, self.database.one(query, (found.location,)))

    def locations(self) -> list[bytes]:
        """Return all locations."""
        return [row[0] for row in self.database.all("SELECT location FROM adapter ORDER BY id")]

    def record(self, sha256: str) -> Record | None:
        """Return the record of a file that could be read, by its SHA-256."""
        query = self._select("sha256 = ? AND error = '' AND reader = ? LIMIT 1")
        row = self.database.one(query, (sha256, READER))
        return None if row is None else record_of(self._by_column(row), self.module_names())

    def module_names(self) -> dict[int, str]:
        """Return the names of layers by id."""
        return dict(self.database.all("SELECT id, name FROM module"))

    def adapters(self, filters: Filters | None = None) -> list[Adapter]:
        """Return the adapters that pass filters, all by default, in the order of their ids."""
        condition, values = (filters or Filters()).sql()
        rows = self.database.all(self._select(f"{condition} ORDER BY a.id"), values)
        return [adapter_of(self._by_column(row)) for row in rows]

    def by_ids(self, ids: Sequence[int]) -> dict[int, Adapter]:
        """Return adapters by id; those that are gone are left out."""
        rows = self.database.of_many(self._select("a.id IN ({})"), ids)
        return {one.id: one for one in (adapter_of(self._by_column(row)) for row in rows)}

    def named(self, name: str) -> Adapter | None:
        """Return an adapter by its name, or by its path below the root."""
        row = self.database.one(self._select("a.name = ?"), (clean(name),))
        if row is not None:
            return adapter_of(self._by_column(row))
        try:
            return self.at(os.fsencode(name))
        except UnicodeEncodeError:  # no file has such a name
            return None

    def at(self, location: bytes) -> Adapter | None:
        """Return an adapter by its location."""
        row = self.database.one(self._select("a.location = ?"), (location,))
        return None if row is None else adapter_of(self._by_column(row))

    def names(self) -> list[str]:
        """Return the names of all adapters."""
        return [name for (name,) in self.database.all("SELECT name FROM adapter ORDER BY id")]

    def candidates(self, family: str) -> list[Candidate]:
        """Return the adapters of a family that change something."""
        names = self.module_names()
        rows = self.database.all(
            self._select("a.family = ? AND a.searchable AND a.norm > 0 ORDER BY a.id"), (family,)
        )
        return [
            Candidate(
                row["id"],
                row["location"],
                row["digest"],
                row["norm"],
                {names[module]: norm for module, norm in norms_of(row).items()},
            )
            for row in map(self._by_column, rows)
        ]

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

    def row(self, identity: int) -> Mapping[str, Any] | None:
        """Return the row of an adapter by column."""
        row = self.database.one(self._select("a.id = ?"), (identity,))
        return None if row is None else self._by_column(row)

    def paths_of(self, digests: Sequence[str]) -> dict[str, list[tuple[int, str]]]:
        """Return id and path of each file with some contents."""
        query = (
            "SELECT digest, id, location FROM adapter WHERE digest <> '' AND digest IN ({}) "
            "ORDER BY id"
        )
        found: dict[str, list[tuple[int, str]]] = {}
        for digest, identity, location in self.database.of_many(query, digests):
            found.setdefault(digest, []).append((identity, shown(location)))
        return found

    def repeated(self) -> list[tuple[str, str]]:
        """Return the path of each file with the content of an earlier one, and that one's path."""
        query = (
            "SELECT a.location, b.location FROM adapter a JOIN adapter b ON b.id = (SELECT MIN(id) "
            "FROM adapter WHERE digest = a.digest) WHERE a.digest <> '' AND b.id < a.id "
            "ORDER BY a.id"
        )
        return [(shown(own), shown(first)) for own, first in self.database.all(query)]

    def keep(self, records: Iterable[Record]) -> None:
        """Write the records of files, in place of earlier ones of the same locations."""
        try:
            with self.database.writing():
                for record in records:
                    self._keep(record)
        except BaseException:
            self._numbers.clear()  # those of layers that were not committed
            raise

    def keep_encodings(self, matrix: Matrix, fingerprint: str, encoded: Iterable[Encoded]) -> None:
        """Write embeddings: first their rows of the matrix, then what names them."""
        with self.database.writing():
            self._agree(fingerprint, matrix.dim)
            new = {one.digest: one for one in encoded}
            query = "SELECT digest FROM encoding WHERE fingerprint = ? AND digest = ?"
            for digest in list(new):
                if self.database.one(query, (fingerprint, digest)):
                    del new[digest]
            vectors = {d: one.vector for d, one in new.items() if one.vector is not None}
            rows = dict(zip(vectors, self._free(fingerprint, len(vectors)), strict=True))
            if vectors:
                matrix.write({rows[digest]: vector for digest, vector in vectors.items()})
            self.database.run_many(
                "INSERT INTO encoding (fingerprint, digest, row, refusal) VALUES (?, ?, ?, ?)",
                [(fingerprint, d, rows.get(d), one.refusal) for d, one in new.items()],
            )

    def pending(self, family: str, fingerprint: str, lenient: bool) -> list[tuple[str, bytes]]:
        """Return digest and location of contents that an encoder has not seen."""
        query = (
            "SELECT digest, location, MIN(id) FROM adapter a WHERE searchable AND family = ? "
            "AND (? OR problem = '') AND NOT EXISTS (SELECT 1 FROM encoding e WHERE "
            "e.fingerprint = ? AND e.digest = a.digest) GROUP BY digest ORDER BY MIN(id)"
        )
        return [row[:2] for row in self.database.all(query, (family, lenient, fingerprint))]

    def failed(self) -> dict[bytes, str]:
        """Return the locations of files that cannot be read, and why."""
        return dict(
            self.database.all("SELECT location, error FROM adapter WHERE error <> '' ORDER BY id")
        )

    def unencoded(self, fingerprint: str) -> list[tuple[bytes, str, list[str], str, str]]:
        """Return location, family, flags, problem and refusal of files without an embedding."""
        query = (
            "SELECT location, family, flags, problem, COALESCE(e.refusal, '') FROM adapter a "
            "LEFT JOIN encoding e ON e.digest = a.digest AND e.fingerprint = ? "
            "WHERE error = '' AND e.row IS NULL ORDER BY id"
        )
        rows = self.database.all(query, (fingerprint,))
        return [(place, family, json.loads(flags), *rest) for place, family, flags, *rest in rows]

    def forget(self, locations: Iterable[bytes]) -> int:
        """Remove files from the index, and return how many there were."""
        removed = 0
        with self.database.writing():
            for location in locations:
                row = self.database.one("SELECT id FROM adapter WHERE location = ?", (location,))
                if row is not None:
                    self._unlist(row[0])
                    self.database.run("DELETE FROM adapter WHERE id = ?", row)
                    removed += 1
        return removed

    def drop_unused(self, family: str, fingerprint: str) -> None:
        """Remove embeddings that no file has, and those of another encoder of the family."""
        others = (
            "fingerprint <> ? AND digest IN (SELECT digest FROM adapter WHERE family = ?) OR "
            "digest NOT IN (SELECT digest FROM adapter)"
        )
        if not self.database.one(f"SELECT 1 FROM encoding WHERE {others}", (fingerprint, family)):
            return
        with self.database.writing():
            self.database.run(f"DELETE FROM encoding WHERE {others}", (fingerprint, family))
            left = "fingerprint NOT IN (SELECT fingerprint FROM encoding)"
            empty = self.database.all(f"SELECT fingerprint FROM matrix WHERE {left}")
            self.database.run(f"DELETE FROM matrix WHERE {left}")
            for (name,) in empty:
                (self.folder / file_name(name)).unlink(missing_ok=True)

    def drop_lost(self, matrix: Matrix, fingerprint: str) -> None:
        """Remove embeddings whose rows are not in the file any more, so that they are made."""
        lost = (fingerprint, len(matrix))
        query = "FROM encoding WHERE fingerprint = ? AND row >= ?"
        if self.database.one(f"SELECT 1 {query}", lost):
            with self.database.writing():
                self.database.run(f"DELETE {query}", lost)

    def _keep(self, record: Record) -> None:
        location = record.found.location
        identity = self.database.one("SELECT id, name FROM adapter WHERE location = ?", (location,))
        name = self._name(location) if identity is None else identity[1]
        self.database.run(_UPSERT, row_of(record, name, self._number))
        (own,) = self.database.one("SELECT id FROM adapter WHERE location = ?", (location,))
        self._unlist(own)
        if record.error:
            return
        told = record.description
        tags = {tag.casefold() for tag in told.tags}
        self.database.run_many(
            "INSERT INTO tag (tag, adapter) VALUES (?, ?)", [(tag, own) for tag in sorted(tags)]
        )
        texts = (told.title, ", ".join(told.triggers), ", ".join(told.tags), told.text, name)
        self.database.run(
            f"INSERT INTO words (rowid, {', '.join(WORD_COLUMNS)}) VALUES (?, ?, ?, ?, ?, ?)",
            (own, *texts),
        )

    def _unlist(self, identity: int) -> None:
        """Remove an adapter from the tables that follow from its row."""
        self.database.run("DELETE FROM tag WHERE adapter = ?", (identity,))
        self.database.run("DELETE FROM words WHERE rowid = ?", (identity,))

    def _name(self, location: bytes) -> str:
        for name in names_of(location):
            if not self.database.one("SELECT 1 FROM adapter WHERE name = ?", (name,)):
                return name
        raise LibraryError(f"{shown(location)} has the name of another file: rename it")

    def _number(self, module: str) -> int:
        """Return the id of a layer."""
        if module not in self._numbers:
            row = self.database.one("SELECT id FROM module WHERE name = ?", (module,))
            insert = "INSERT INTO module (name) VALUES (?)"
            self._numbers[module] = row[0] if row else self.database.run(insert, (module,))
        return self._numbers[module]

    def _agree(self, fingerprint: str, dim: int) -> None:
        row = self.database.one("SELECT dim FROM matrix WHERE fingerprint = ?", (fingerprint,))
        if row is None:
            values = (fingerprint, dim)
            self.database.run("INSERT INTO matrix (fingerprint, dim) VALUES (?, ?)", values)
        elif row[0] != dim:
            raise LibraryError(
                f"the encoder gives {dim} numbers, but the index holds {row[0]} of an encoder with "
                "the same fingerprint"
            )

    def _free(self, fingerprint: str, count: int) -> list[int]:
        """Return the first rows of the matrix that no committed embedding has."""
        query = "SELECT COUNT(row), MAX(row) FROM encoding WHERE fingerprint = ?"
        taken, last = self.database.one(query, (fingerprint,))
        end = 0 if last is None else last + 1
        if taken == end:
            return list(range(end, end + count))
        query = "SELECT row FROM encoding WHERE fingerprint = ? AND row IS NOT NULL"
        used = {row for (row,) in self.database.all(query, (fingerprint,))}
        gaps = [row for row in range(end) if row not in used][:count]
        return gaps + list(range(end, end + count - len(gaps)))

    def _select(self, condition: str) -> str:
        columns = ", ".join(f"a.{column}" for column in self._columns)
        return f"SELECT {columns} FROM adapter a WHERE {condition}"

    def _by_column(self, row: Sequence[Any]) -> Mapping[str, Any]:
        return dict(zip(self._columns, row, strict=True))


def _same(found: Found, stamp: Sequence[Any] | None) -> bool:
    """Return whether a file is that of a row; of one that failed, permissions count, too."""
    if stamp is None:
        return False
    own = (found.location, found.size, found.mtime_ns, found.config, READER)
    return own == tuple(stamp[:-1]) and stamp[-1] in (0, found.ctime_ns)
