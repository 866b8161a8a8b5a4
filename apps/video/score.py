"""``gates video score``: files of rows to Parquet files of probabilities, each whole or absent."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from apps.video.commands import place_of
from core_gates.errors import GatesError
from harness.command.verbs import Place
from harness.files import content_digest, remove, replacing, require_apart, write_json
from harness.runs.terminal import counting
from recsys.columns.canonical import UNREADABLE, RowError, canonical, holds_times, numbers_of
from recsys.columns.hashing import QuantileSketch
from recsys.data.readers.files import Part, find_parts, located
from recsys.model_folder import read_settings
from recsys.schema import source_of
from recsys.table_scorer import Model, chosen_tasks, read_model, refuse_infinite
from recsys.transform.fitting import has_shifted, places_of
from video_multitask.scorer import Fusion, fusion_of

RECORD, ORIGIN = "record.json", b"gates"
MANY, FAR, LEAST = 0.2, 5.0, 0.05
"""Rates of rows with unseen values that are a warning: many, or far above that of validation rows,
how many times, and above a least rate."""


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
        if differing:  # all predictions of the old record go
            for path in sorted(self.root.rglob("*.parquet")):
                if not path.name.startswith(".") and self._origin(path) is not None:
                    remove(path)
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
        """Return the metadata that a predictions file stores about its origin."""
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
            written = json.loads(path.read_text(encoding="utf-8"))
            names = [name for name in self.record if written[name] != self.record[name]]
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


class ShardWriter:
    """Writes the predictions of one file after another.

    Args:
        model: The model.
        tasks: Places of the tasks that are written.
        fusion: Of the fused score; None for none.
        known: Of the rows that validated the model, those with unseen values, by sparse column.

    Attributes:
        rows: Rows that were scored.
        unknown: (F,) rows among them in which a sparse column has a value unseen in training.
        missing: Rows among them in which each sparse column and each history has none.
        counts: Numbers of each dense column by where they lie, see
            `recsys.transform.fitting.places_of`.
    """

    def __init__(
        self,
        model: Model,
        tasks: Sequence[int],
        fusion: Fusion | None,
        unknown_shares: Mapping[str, float],
    ) -> None:
        self.known, self.version, self.scorer = unknown_shares, *model
        self.tasks, self.fusion = tuple(tasks), fusion
        self.rows = 0
        self.unknown = np.zeros(len(self.scorer.sparse_names), np.int64)
        schema = self.scorer.schema
        self._sources = [*map(source_of, schema.sparse), *(h.name for h in schema.sequences)]
        self.missing = np.zeros(len(self._sources), np.int64)
        self.ranges = self.scorer.transform.fitted.ranges
        self.counts = {name: np.zeros(5, np.int64) for name in self.ranges}
        self._numbers = {name: QuantileSketch() for name in self.ranges}

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
                    raise located(whole, part.path) from error
                except GatesError as error:
                    raise GatesError(f"{part.path}: {error}") from error
                if written is None:
                    table = table.replace_schema_metadata(dict(footer))
                    written = pq.ParquetWriter(path, table.schema, compression="zstd")
                try:
                    table = table.cast(written.schema)
                except pa.ArrowInvalid as error:
                    raise GatesError(
                        f"{part.path}: a column changes from numbers to text below row {begun}"
                        f" ({error}): write it in one form, or name other --key_columns"
                    ) from error
                written.write_table(table, row_group_size=len(table) or 1)
                begun += len(block)
                yield len(block)
        finally:
            if written is not None:
                written.close()

    def _predictions(self, part: Part, block: pl.DataFrame, keys: Sequence[str]) -> pl.DataFrame:
        scored = self.scorer.score(block)
        refuse_infinite({"p": scored.probabilities}, self.version)
        self.rows += len(block)
        self.unknown += scored.unknown.sum(0)
        self.missing += scored.missing.sum(0)
        for name, value_range in self.ranges.items():
            numbers = self.scorer.transform.numbers(block, name)
            self.counts[name] += places_of(numbers, value_range)
            self._numbers[name].add(numbers[~np.isnan(numbers)])
        copied = block.select(keys)
        copied = copied.with_columns(
            _integers(column, is_time=column.name == self.scorer.schema.time)
            for column in copied
            if self._is_integer(column.name)
        )
        names = self.scorer.task_names
        columns = [pl.Series(f"p_{names[i]}", scored.probabilities[:, i]) for i in self.tasks]
        if self.fusion is not None:
            fused = self.fusion(scored.probabilities)
            refuse_infinite({"score": fused}, self.version)
            columns.append(pl.Series("score", fused))
        return copied.with_columns(columns)

    def doubts(self) -> Iterator[str]:
        """Yield how many rows have values that training had not, for each column with one."""
        for name, (low, _, median, _, high) in self.ranges.items():
            rows, below, above, *_ = self.counts[name].tolist()
            if self.rows and not rows:
                yield f"WARNING: {name}: no row holds a number"
            ends = (
                (below, "below the training minimum", low),
                (above, "above the training maximum", high),
            )
            said = [f"{n / rows:.1%} of the rows {where} {end:,.6g}" for n, where, end in ends if n]
            if shifted := has_shifted(self.counts[name]):
                median_given = float(self._numbers[name].quantiles(0.5))
                times, both = (
                    f"{median_given / (median or 1):,.4g} times",
                    f"{median_given:,.6g}, not {median:,.6g}",
                )
                said.append(f"median {times if median_given * median > 0 else both}")
            if said:
                warns = shifted or below + above >= LEAST * rows
                yield f"{'WARNING: ' * warns}{name}: {', '.join(said)}"
        rows_missing = zip(self._sources, self.missing.tolist(), strict=True)
        empty = dict.fromkeys(name for name, n in rows_missing if 0 < self.rows == n)
        yield from (f"WARNING: {name}: no row holds a value" for name in empty)
        for name, count in zip(self.scorer.sparse_names, self.unknown.tolist(), strict=True):
            if not count:
                continue
            share, before = count / self.rows, self.known.get(name)
            line = (
                f"{name}: {count:,} of {self.rows:,} rows ({share:.1%}) hold values that training "
                "has not seen"
                + ("" if before is None else f", {before:.1%} of those that validated it")
            )
            if share >= MANY or (before is not None and share >= max(LEAST, FAR * before)):
                line = f"WARNING: {line}: are they written as in training, {self._example(name)}?"
            yield line

    def _example(self, name: str) -> str:
        """Return a value that training has seen."""
        transform = self.scorer.transform
        values = getattr(transform.tables.get(transform.sparse_tables[name]), "values", None)
        return "which has none" if values is None or values.is_empty() else f"as {values[0]!r}"

    def _is_integer(self, name: str) -> bool:
        """Return whether a column held integers in training, whatever a file makes of them."""
        transform = self.scorer.transform
        if name == transform.schema.time and name not in transform.sparse_tables:
            return isinstance(transform.fitted.last, int)
        table = transform.sparse_tables.get(name)
        return table in transform.tables and transform.tables[table].kind == "integer"


def _integers(column: pl.Series, *, is_time: bool) -> pl.Series:
    """Return a key as Int64 in files of all kinds; times and larger integers stay as they are."""
    dtype = column.dtype
    if dtype == pl.UInt64 or dtype.is_temporal():
        return column
    if dtype.is_integer() or dtype in (pl.Boolean, pl.Null):
        return column.cast(pl.Int64)
    integers = canonical(column, "integer")
    if (wrong := integers == UNREADABLE).any():
        if is_time and holds_times(column):
            return column
        row = int(wrong.arg_max() or 0)
        raise RowError(column.name, row, f"{column[row]!r} is no integer, unlike in training")
    return integers.set(pl.Series(np.isnan(numbers_of(column))), None)


def score(
    place: Place,
    sources: list[str],
    model: str | None = None,
    output: str | None = None,
    key_columns: tuple[str, ...] = (),
    tasks: tuple[str, ...] = (),
    fused: dict[str, float] | None = None,
    offsets: dict[str, float] | None = None,
    int8: bool = False,
    threads: int = 1,
    overwrite_output: bool = False,
) -> None:
    """Score SOURCES, Parquet or CSV files or folders of them: one file of probabilities per file.

    Files are read block by block. Those that are complete stay when the command is killed or called
    again; only the others are made. A file that was made with another model or other options is
    refused.

    Args:
        place: Filled in by the command line.
        sources: Files of rows, Parquet or CSV, or folders of them.
        model: Folder of the model; by default that of the run.
        output: Folder of the predictions; that of the run by default.
        key_columns: Columns that are copied; by default user, item and time of the model's
            schema, where the files have them.
        tasks: Tasks whose probabilities are written; all by default.
        fused: Exponents of tasks; adds the fused score, the product of (offset + p) ^ exponent.
        offsets: Numbers by task that the fused score adds to its probability.
        int8: Keep embedding tables as 8-bit integers in memory.
        threads: Threads of the network.
        overwrite_output: Replace predictions of another model, with other options or of other
            content.
    """
    if threads < 1:
        raise GatesError(f"--threads must be at least 1, found {threads}")
    _refuse_twice("--tasks", tasks)
    _refuse_twice("--key_columns", key_columns)
    torch.set_num_threads(threads)
    parts = find_parts(sources)
    folder = place_of(place, model)
    served, shares = read_model(folder, int8=int8), read_settings(folder).get("unknown", {})
    chosen = chosen_tasks(served.scorer.task_names, tasks)
    fusion = fusion_of(served.scorer.task_names, fused, offsets)
    root = Path(output) if output else place.run_folder.path / "predictions"
    written = [served.scorer.task_names[task] for task in chosen]
    options = {
        "key_columns": list(key_columns),
        "tasks": written,
        "fused": fusion.settings if fusion else None,
    }
    shards = Shards(root, served.version, options)
    shards.refuse_inside(parts)
    made = [f"p_{task}" for task in written] + (["score"] if fusion else [])
    copied = _check_columns(parts, served, key_columns, made)
    missing = shards.claim(parts, overwrite=overwrite_output)
    if kept := len(parts) - len(missing):
        print(f"{kept} of {len(parts)} files are complete already")
    _score_all(missing, shards, ShardWriter(served, chosen, fusion, shares), copied)
    print(root)


def _refuse_twice(option: str, names: tuple[str, ...]) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise GatesError(f"{option} names {twice[0]!r} twice: name it once")


def _score_all(
    parts: list[Part], shards: Shards, writer: ShardWriter, copied: dict[Part, list[str]]
) -> None:
    counts = [part.num_rows() for part in parts]
    total = sum(n for n in counts if n is not None) if None not in counts else None
    done = 0
    with counting("scoring rows") as count:
        for part in parts:
            with shards.writing(part) as path:
                for rows in writer.write(part, path, copied[part], shards.footer(part)):
                    done += rows
                    count(done, total)
    for line in writer.doubts():
        print(line)


def _check_columns(
    parts: list[Part], model: Model, keys: tuple[str, ...], made: list[str]
) -> dict[Part, list[str]]:
    """Return the columns that are copied from each file, after checking that all can be scored.

    None of them may have the name of a column that is ``made``.
    """
    schema = model.scorer.schema
    copied = {}
    for part in parts:
        names = part.columns()
        try:
            schema.check_columns(names, labels=False)
        except GatesError as error:
            raise GatesError(f"{part.path}: {error}") from error
        if absent := [name for name in keys if name not in names]:
            raise GatesError(f"{part.path} has no column {absent[0]!r}: correct --key_columns")
        default = [n for n in (schema.user, schema.item, schema.time) if n and n in names]
        copied[part] = list(keys) or list(dict.fromkeys(default))
        if taken := [name for name in copied[part] if name in made]:
            raise GatesError(
                f"{part.path}: the column {taken[0]!r} has the name of a prediction: rename it, or "
                "name other --key_columns"
            )
    return copied
