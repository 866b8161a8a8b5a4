"""From raw tables to packed arrays, alike in training, scoring and serving."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from core_gates.errors import GatesError
from harness.files import replacing, write_json
from recsys.columns.canonical import (
    RowError,
    canonical,
    keys_of,
    numbers_of,
    part_of,
    without_words,
)
from recsys.columns.hashing import bucket, combine, hash_integers
from recsys.inputs import Batch
from recsys.schema import FeatureSchema, Sparse, indicator_of, source_of
from recsys.transform.fitting import Buckets, Fitted, Fitting, Scaler, Table, encode_history
from recsys.transform.targets import read_targets
from recsys.vocabulary import FIRST, MISSING, HashedValues, Vocabulary

FILE, FORMAT = "transform.json", 1


class Stored(NamedTuple):
    """What a folder holds; see `recsys.transform.FeatureTransform`."""

    schema: FeatureSchema
    fitted: Fitted
    tables: dict[str, Table]
    scalers: dict[str, Scaler | Buckets]
    missing: tuple[str, ...]


def write_folder(
    folder: Path,
    schema: FeatureSchema,
    fitted: Fitted,
    tables: Mapping[str, Table],
    scalers: Mapping[str, Scaler | Buckets],
    missing: Sequence[str] = (),
) -> Path:
    """Write a transform; the folder is the old or the new one, never a mixture."""
    stated: dict[str, Any] = {}
    with replacing(folder) as temporary:
        temporary.mkdir(parents=True)
        for number, (name, table) in enumerate(tables.items()):
            if isinstance(table, HashedValues):
                stated[name] = dataclasses.asdict(table)
            else:
                file = f"vocabulary_{number:03d}.parquet"
                table.save(temporary / file)
                stated[name] = {"file": file, "rows": len(table)}
        content = {
            "format": FORMAT,
            "schema": schema.to_dict(),
            "fitted": fitted._asdict(),
            "tables": stated,
            "dense": {name: _stated(scaler) for name, scaler in scalers.items()},
        }
        if missing:  # files of tables without such words are as they always were
            content["missing"] = list(missing)
        write_json(temporary / FILE, content)
    return folder


def read_folder(folder: Path) -> Stored:
    """Return what `write_folder` wrote.

    Raises:
        GatesError: The folder is absent, incomplete, or of another format.
    """
    path = folder / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']}, this version reads {FORMAT}")
        tables = {name: _table(folder, stated) for name, stated in content["tables"].items()}
        scalers = {name: _scaler(stated) for name, stated in content["dense"].items()}
        schema, fitted = FeatureSchema.from_dict(content["schema"]), Fitted(**content["fitted"])
        missing = tuple(map(str, content.get("missing", ())))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise GatesError(
            f"{path} holds no transform of features: {what}; name the folder that a training wrote"
        ) from error
    if lacking := {f.table_name for f in schema.sparse} - tables.keys():
        raise GatesError(f"{path} lacks the table {min(lacking)!r}: copy the whole folder again")
    return Stored(schema, fitted, tables, scalers, missing)


def _table(folder: Path, stated: Mapping[str, Any]) -> Table:
    if "file" not in stated:
        return HashedValues(**stated)
    table = Vocabulary.load(folder / stated["file"])
    if len(table) != stated["rows"]:
        raise ValueError(f"{stated['file']} has {len(table)} rows, not {stated['rows']}")
    return table


def _stated(scaler: Scaler | Buckets) -> dict[str, Any]:
    if isinstance(scaler, Scaler):
        return scaler._asdict()
    return {"edges": scaler.edges.tolist(), "buckets": scaler.buckets}


def _scaler(stated: Mapping[str, Any]) -> Scaler | Buckets:
    if "edges" in stated:
        return Buckets(np.asarray(stated["edges"], np.float64), stated["buckets"])
    return Scaler(**stated)


BLOCK = 2**14  # rows that are encoded at once, so that they stay in the cache

Keys = tuple[NDArray[np.int64], NDArray[np.bool_]]


class Features(NamedTuple):
    """Encoded features of N rows; columns as in `recsys.inputs.Batch`.

    Attributes:
        sparse: (N, F) int64: sparse features, crossed ones, dense ones in buckets.
        dense: (N, 2D) float32: D scaled numbers, then 1 where each was missing.
        sequences: (N, L) int64 each.
    """

    sparse: NDArray[np.int64]
    dense: NDArray[np.float32]
    sequences: tuple[NDArray[np.int64], ...]


class FeatureTransform:
    """Vocabularies and scales of a schema's columns, learned from training rows only.

    Whatever a table brings in another order or type is read alike: numbers as strings, whole
    numbers as floats, further columns. Values that training did not see are *unknown*; null, NaN,
    infinities, empty strings and negative integers of categorical columns are *missing*. A missing
    number becomes 0, the mean, and is marked by its indicator. Histories are encoded by the
    vocabulary of the feature that they name and add no values to it.

    Args:
        schema: What the columns are.
        missing: Words in text that stand for missing values wherever a table comes from, such as
            ``NA``.

    Attributes:
        schema: As given.
        missing: As given.
        fitted: The rows that it has learned from.
        tables: Vocabulary or hashing of each table of sparse features.
        scalers: Scale or buckets of each dense column.

    Raises:
        ValueError: Features share a table and differ in how it is stored, or two kinds of tables
            have one name.
    """

    def __init__(self, schema: FeatureSchema, missing: Sequence[str] = ()) -> None:
        self.schema, self.missing, self.fitted = schema, tuple(missing), Fitted()
        self.tables: dict[str, Table] = {}
        self.scalers: dict[str, Scaler | Buckets] = {}
        shared: dict[str, Sparse] = {}
        for feature in schema.sparse:
            first = shared.setdefault(feature.table_name, feature)
            if _storage(first) != _storage(feature):
                raise ValueError(
                    f"features {first.name!r} and {feature.name!r} share the table "
                    f"{feature.table_name!r}, but differ in storage, buckets or min_count"
                )
        others = [*(cross.name for cross in schema.crossed), *self._bucketed]
        if taken := sorted(shared.keys() & set(others)):
            raise ValueError(f"two tables are named {taken[0]!r}: rename that of a sparse feature")

    @property
    def _bucketed(self) -> list[str]:
        return [f.name for f in self.schema.dense if f.scaling == "buckets"]

    @property
    def sparse_tables(self) -> dict[str, str]:
        """Name of each of the F sparse columns, in order, to the name of its table."""
        tables = {feature.name: feature.table_name for feature in self.schema.sparse}
        others = [*(cross.name for cross in self.schema.crossed), *self._bucketed]
        return {**tables, **{name: name for name in others}}

    @property
    def sizes(self) -> dict[str, int]:
        """Rows of each table by its name, those for unknown and missing included.

        A table of storage ``quotient_remainder`` counts the rows that it stands for.
        """
        self._check_fitted()
        sizes_of_tables = {name: len(table) for name, table in self.tables.items()}
        sizes_of_tables |= {cross.name: FIRST + cross.buckets for cross in self.schema.crossed}
        buckets = {n: s.num_rows for n, s in self.scalers.items() if isinstance(s, Buckets)}
        return sizes_of_tables | buckets

    @property
    def dense_names(self) -> tuple[str, ...]:
        """Names of the dense inputs, in order: the columns, then their indicators."""
        names = [f.name for f in self.schema.dense if f.scaling != "buckets"]
        return (*names, *map(indicator_of, names))

    @property
    def dense_width(self) -> int:
        """Number of dense inputs."""
        return len(self.dense_names)

    def numbers(self, table: pl.DataFrame, name: str) -> NDArray[np.float64]:
        """Return the numbers (N,) of a dense column, NaN where missing."""
        return numbers_of(self._column(table, name))

    def fit(self, table: pl.DataFrame) -> FeatureTransform:
        """Learn from the training rows; what was learned before is forgotten.

        Raises:
            GatesError: There is no row, a column is missing, or has values that cannot be read.
        """
        return self.fit_batches([table])

    def fit_batches(self, tables: Iterable[pl.DataFrame]) -> FeatureTransform:
        """Learn from training rows that do not fit into memory, see `fit`."""
        fitting = _collected(self.schema, tables, self.missing)
        self.tables, self.scalers = fitting.tables(), fitting.scalers()
        self.fitted = fitting.fitted._replace(ranges=fitting.ranges())
        return self

    def grow(self, table: pl.DataFrame) -> FeatureTransform:
        """Return a transform with the new values of further training rows appended.

        Every old value keeps its row; scales and buckets stay as they are, since weights rely on
        them.

        Raises:
            GatesError: See `fit`.
        """
        self._check_fitted()
        fitting = _collected(self.schema, [table], self.missing)
        grown = FeatureTransform(self.schema, self.missing)
        grown.tables, grown.scalers = fitting.grown(self.tables), dict(self.scalers)
        grown.fitted = self.fitted.joined(fitting.fitted)
        return grown

    def encode(self, table: pl.DataFrame, *, fill_absent: bool = False) -> Features:
        """Return the encoded features of N rows.

        Args:
            table: N rows; labels and further columns are not needed.
            fill_absent: Take columns that the table lacks as missing in all rows, instead of
                refusing the table.

        Raises:
            GatesError: The transform is not fitted, or a column is absent or of a wrong type.
            RowError: A value is no number where one is needed.
        """
        self._check_fitted()
        if not fill_absent:
            self.schema.check_columns(table.columns, labels=False)
        count = len(table)
        encoded = Features(
            np.empty((count, len(self.sparse_tables)), np.int64),
            np.empty((count, self.dense_width), np.float32),
            tuple(np.empty((count, s.max_length), np.int64) for s in self.schema.sequences),
        )
        for start in range(0, count, BLOCK):
            rows = slice(start, start + BLOCK)
            block = table if count <= BLOCK else table[rows]
            try:
                self._encode_sparse(block, encoded.sparse[rows])
                self._encode_dense(block, encoded.sparse[rows], encoded.dense[rows])
                for history, out in zip(self.schema.sequences, encoded.sequences, strict=True):
                    column = _column(block, history.name)
                    of = self.tables[self.sparse_tables[history.of]]
                    encode_history(column, history, of, out[rows], self.missing)
            except RowError as error:
                raise error.shifted(start) from error
        return encoded

    def _encode_sparse(self, table: pl.DataFrame, out: NDArray[np.int64]) -> None:
        """Write rows of sparse and crossed features to the first columns of ``out``."""
        crossed = {name for cross in self.schema.crossed for name in cross.of}
        kept: dict[str, Keys] = {}
        for number, feature in enumerate(self.schema.sparse):
            rows = self.tables[feature.table_name]
            column = part_of(self._column(table, source_of(feature)), feature.part)
            keys = keys_of(canonical(column, rows.kind))
            out[:, number] = rows.rows_of_keys(*keys)
            if feature.name in crossed:
                kept[feature.name] = keys
        for number, cross in enumerate(self.schema.crossed, len(self.schema.sparse)):
            hashes = hash_integers(kept[cross.of[0]][0])
            missing = kept[cross.of[0]][1]
            for name in cross.of[1:]:
                hashes = combine(hashes, hash_integers(kept[name][0]))
                missing = missing | kept[name][1]
            out[:, number] = np.where(missing, MISSING, FIRST + bucket(hashes, cross.buckets))

    def _encode_dense(
        self, table: pl.DataFrame, sparse: NDArray[np.int64], dense: NDArray[np.float32]
    ) -> None:
        """Write numbers and indicators to ``dense``, buckets to the last columns of ``sparse``."""
        number, width = 0, self.dense_width // 2
        bucketed = len(self.schema.sparse) + len(self.schema.crossed)
        for feature in self.schema.dense:
            numbers = self.numbers(table, feature.name)
            scaler = self.scalers[feature.name]
            if isinstance(scaler, Buckets):
                sparse[:, bucketed] = scaler.rows(numbers)
                bucketed += 1
            else:
                dense[:, width + number] = scaler.scale(numbers, dense[:, number])
                number += 1

    def batch(
        self,
        table: pl.DataFrame,
        *,
        labels: bool = True,
        fill_absent: bool = False,
        first_row: int = 0,
    ) -> Batch:
        """Return the encoded rows of a table with labels, masks, weights and users.

        Args:
            table: N rows.
            labels: Whether the table has labels; without, they are 0 and no task counts.
            fill_absent: See `encode`.
            first_row: Rows before these; they number the users where no column does.

        Raises:
            GatesError: See `encode`; or a label, the weight or the user is absent.
            RowError: A label is neither 0 nor 1, or a weight is negative.
        """
        if labels:
            self.schema.check_columns(table.columns, labels=True)
            if self.schema.user not in ("", *table.columns):
                raise GatesError(
                    f"the table lacks the column {self.schema.user!r} of the user, by which rows "
                    "are grouped: add it, or name no user in the schema"
                )
        features = self.encode(table, fill_absent=fill_absent)
        targets = read_targets(table, self.schema, labels=labels, first_row=first_row)
        return Batch(
            torch.from_numpy(features.sparse),
            torch.from_numpy(features.dense),
            tuple(map(torch.from_numpy, features.sequences)),
            *map(torch.from_numpy, targets),
        )

    def save(self, folder: Path) -> Path:
        """Write schema, vocabularies and scales to a folder, which replaces an old one whole."""
        self._check_fitted()
        content = (self.schema, self.fitted, self.tables, self.scalers, self.missing)
        return write_folder(folder, *content)

    @classmethod
    def load(cls, folder: Path) -> FeatureTransform:
        """Return the transform that `save` wrote.

        Raises:
            GatesError: The folder is absent, or no transform.
        """
        stored = read_folder(folder)
        transform = cls(stored.schema, stored.missing)
        transform.fitted, transform.tables = stored.fitted, stored.tables
        transform.scalers = stored.scalers
        for table in transform.tables.values():
            table.lookup(pl.Series([None]))  # the index is built now, not with the first request
        return transform

    def _column(self, table: pl.DataFrame, name: str) -> pl.Series:
        """Return a column, null where it holds a missing word, all null if the table lacks it."""
        return without_words(_column(table, name), self.missing)

    def _check_fitted(self) -> None:
        if not self.fitted.rows:
            raise GatesError("the transform has learned from no rows yet: call fit, or load one")


def _column(table: pl.DataFrame, name: str) -> pl.Series:
    if name in table.columns:
        return table[name]
    return pl.Series(name, [None], dtype=pl.Null).new_from_index(0, len(table))


def _collected(
    schema: FeatureSchema, tables: Iterable[pl.DataFrame], missing: Sequence[str]
) -> Fitting:
    fitting = Fitting(schema, missing)
    for table in tables:
        fitting.add(table)
    if not fitting.fitted.rows:
        raise GatesError("there are no training rows to learn vocabularies and scales from")
    return fitting


def _storage(feature: Sparse) -> tuple[str, int, int]:
    return feature.storage, feature.buckets, feature.min_count
