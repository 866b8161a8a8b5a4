"""What ``gates video score`` writes: a Parquet file per file, whole or absent, with its origin."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from apps.video.serving.fusion import Fusion
from apps.video.serving.model import Model, refuse_infinite
from core_gates.errors import GatesError
from harness.files import content_digest, remove, replacing, require_apart, write_json
from recsys.columns.canonical import UNREADABLE, canonical
from recsys.columns.numbers import numbers_of
from recsys.columns.row_error import RowError
from recsys.data.readers.files import located
from recsys.parts import Part

RECORD, ORIGIN = "record.json", b"gates"


class Shards:
    """The folder of predictions, one file per file of the sources.

    ``record.json`` holds model and options; the footer of each file, in addition, the hash of the
    content that it was made from.

    Args:
        root: The folder.
        model: Version of the model.
        options: What else the predictions depend on.
    """

    def __init__(self, root: Path, model: str, options: Mapping[str, Any]) -> None:
        self.root = root
        self.record: dict[str, Any] = {"model": model, "options": dict(options)}
        self._digests: dict[Part, str] = {}

    def claim(self, parts: Sequence[Part], *, overwrite: bool) -> list[Part]:
        """Return the files whose predictions are missing, after writing the record.

        Args:
            parts: Files of the sources.
            overwrite: Whether what was made otherwise is replaced.

        Raises:
            GatesError: The folder is not of this command, or predictions were made otherwise and
                may not be replaced.
        """
        differing = self._differing()
        if differing and not overwrite:
            raise GatesError(
                f"{self.root} holds predictions of another {differing}: choose another --output or "
                "add --overwrite_output"
            )
        missing = []
        for part in parts:
            origin = self._origin(self.path(part))
            if origin is not None and origin == self._wanted(part):
                continue
            if origin is not None and not overwrite:
                raise GatesError(
                    f"{self.path(part)} was made from other content of {part.path}: choose another "
                    "--output or add --overwrite_output"
                )
            missing.append(part)
        if differing:
            self._clear()
        if differing or not (self.root / RECORD).is_file():
            write_json(self.root / RECORD, self.record)
        return missing

    def refuse_inside(self, parts: Sequence[Part]) -> None:
        """Refuse to read what this command has written.

        Raises:
            GatesError: A file lies in the folder.
        """
        require_apart(self.root, [part.path for part in parts])

    def path(self, part: Part) -> Path:
        """Return the place of the predictions of a file."""
        return self.root / f"{part.name}.parquet"

    def footer(self, part: Part) -> dict[bytes, bytes]:
        """Return what the predictions of a file hold about their origin."""
        return {ORIGIN: json.dumps(self._wanted(part), sort_keys=True).encode()}

    def writing(self, part: Part) -> AbstractContextManager[Path]:
        """Return a context with a path that becomes the predictions of a file when it succeeds."""
        return replacing(self.path(part))

    def _wanted(self, part: Part) -> dict[str, Any]:
        if part not in self._digests:
            self._digests[part] = content_digest(part.path).sha256
        return {**self.record, "source": self._digests[part]}

    def _differing(self) -> str:
        """Return what an existing folder was made with: ``model``, ``options``, or nothing."""
        path = self.root / RECORD
        if not path.is_file():
            if self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir())):
                raise GatesError(
                    f"{self.root} exists and is no folder of predictions: choose another --output"
                )
            return ""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            names = [name for name in self.record if found[name] != self.record[name]]
        except (ValueError, KeyError, TypeError) as error:
            raise GatesError(f"{path} is damaged: choose another --output") from error
        return " and other ".join(names)

    def _origin(self, path: Path) -> Any:
        """Return the origin of existing predictions, None if there are none."""
        if not path.is_file():
            return None
        try:
            metadata = pq.read_schema(path).metadata or {}
            return json.loads(metadata[ORIGIN])
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            line = f"{path} was not made by this command: choose another --output"
            raise GatesError(line) from error

    def _clear(self) -> None:
        """Remove all predictions of an old record."""
        for path in sorted(self.root.rglob("*.parquet")):
            if not path.name.startswith(".") and self._origin(path) is not None:
                remove(path)


class ShardWriter:
    """Writes the predictions of one file after another.

    Args:
        model: The model.
        tasks: Places of the tasks that are written.
        fusion: Of the fused score; None for none.
    """

    def __init__(self, model: Model, tasks: Sequence[int], fusion: Fusion | None) -> None:
        self.version, self.scorer = model
        self.tasks, self.fusion = tuple(tasks), fusion

    def write(
        self, part: Part, path: Path, keys: Sequence[str], footer: Mapping[bytes, bytes]
    ) -> Iterator[int]:
        """Write the predictions of a file block by block, and yield the rows of each.

        Args:
            part: The file.
            path: Where to.
            keys: Columns that are copied.
            footer: Metadata of the new file.

        Raises:
            GatesError: The file cannot be read, or a value is wrong; names file, line and column.
        """
        schema = self.scorer.schema
        columns = list(dict.fromkeys([*schema.features, *keys]))
        lists = [history.name for history in schema.sequences]
        begun, written = 0, None
        try:
            for block in part.blocks(columns, lists, self.scorer.transform.missing):
                try:
                    table = self._predictions(part, block, keys).to_arrow()
                except RowError as error:
                    whole = RowError(error.column, error.row + begun, error.problem)
                    raise located(whole, part.path, skip_blank=True) from error
                except GatesError as error:
                    raise GatesError(f"{part.path}: {error}") from error
                if written is None:
                    table = table.replace_schema_metadata(dict(footer))
                    written = pq.ParquetWriter(path, table.schema, compression="zstd")
                written.write_table(table.cast(written.schema), row_group_size=len(table) or 1)
                begun += len(block)
                yield len(block)
        finally:
            if written is not None:
                written.close()

    def _predictions(self, part: Part, block: pl.DataFrame, keys: Sequence[str]) -> pl.DataFrame:
        scored = self.scorer.score(block)
        refuse_infinite({"p": scored.probabilities}, self.version)
        copied = block.select(keys)
        copied = copied.with_columns(_integers(c) for c in copied if self._is_integer(c.name))
        names = self.scorer.task_names
        columns = [pl.Series(f"p_{names[i]}", scored.probabilities[:, i]) for i in self.tasks]
        if self.fusion is not None:
            fused = self.fusion(scored.probabilities)
            refuse_infinite({"score": fused}, self.version)
            columns.append(pl.Series("score", fused))
        return copied.with_columns(columns)

    def _is_integer(self, name: str) -> bool:
        """Return whether a column held integers in training, whatever a file makes of them."""
        transform = self.scorer.transform
        if name == transform.schema.time and name not in transform.sparse_tables:
            return isinstance(transform.fitted.last, int)
        table = transform.sparse_tables.get(name)
        return table in transform.tables and transform.tables[table].kind == "integer"


def _integers(column: pl.Series) -> pl.Series:
    """Return a key as Int64 in files of all kinds; dates and larger integers stay as they are."""
    dtype = column.dtype
    if dtype == pl.UInt64 or dtype.is_temporal():
        return column
    if dtype.is_integer() or dtype in (pl.Boolean, pl.Null):
        return column.cast(pl.Int64)
    found = canonical(column, "integer")
    if (wrong := found == UNREADABLE).any():
        row = int(wrong.arg_max() or 0)
        raise RowError(column.name, row, f"{column[row]!r} is no integer, unlike in training")
    return found.set(pl.Series(np.isnan(numbers_of(column))), None)
