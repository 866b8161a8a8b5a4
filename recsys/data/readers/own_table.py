"""One's own log: a table with 0-1 labels, split and described by a few names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import polars as pl

from core_gates.errors import GatesError, check_at_least, check_option
from recsys.columns.canonical import RowError, form_of
from recsys.data.readers.files import files_of, located_in, read_file, read_table
from recsys.data.tables import RankingTables, Split, split_by_hash, split_by_time
from recsys.infer import infer_schema, stated_tasks
from recsys.schema import FeatureSchema, tasks_of

SplitKind = Literal["time", "user", "row"]


@dataclass(frozen=True)
class OwnTable:
    """A Parquet or CSV file, or a folder of them, with whatever columns it has.

    Attributes:
        path: The rows, see `recsys.data.readers.files.read_table`.
        labels: Columns with 0 and 1 that are predicted, and of numbers next to them; or name to
            category. Not needed with a schema.
        user: Column of the user; each row its own if empty.
        item: Column of what is ranked.
        time: Column that orders the rows.
        weight: Column of sample weights.
        drop: Columns that must not be features, such as what happens after the label.
        schema: The schema as a mapping, as `FeatureSchema.to_dict` returns and a drafted one
            can be written down; drafted from the training rows if None.
        split: By ``time``, by the hash of the ``user`` or of the ``row`` number; by time if there
            is such a column by default, else by user, else by row.
        validation: Fraction of the rows.
        test: Fraction of the rows.
        test_path: Rows to test on, if they are another table; ``test`` does not count then.
        missing: Words in text that are null, such as ``NA``; the trained network knows them, too.
        dim: Features of an embedding, where the schema is drafted.
    """

    path: str
    labels: Sequence[str] | Mapping[str, str] = ()
    user: str = ""
    item: str = ""
    time: str = ""
    weight: str = ""
    drop: Sequence[str] = ()
    schema: Mapping[str, Any] | None = None
    split: SplitKind | None = None
    validation: float = 0.1
    test: float = 0.1
    test_path: str = ""
    missing: Sequence[str] = ()
    dim: int = 8

    def __post_init__(self) -> None:
        """Refuse an unknown split, a wrong schema or width, labels that are keys, no labels."""
        check_at_least(1, dim=self.dim)
        if self.split is not None:
            check_option("split", self.split, ("time", "user", "row"))
        if not self.labels and self.schema is None:
            raise ValueError("name the labels, columns with 0 and 1 that are to be predicted")
        self._known()

    def read(self) -> RankingTables:
        """Return the three parts and the schema; notes tell how it was drafted.

        Raises:
            GatesError: A file cannot be read, a column is missing or the split cannot be made.
            RowError: A cell cannot be read.
        """
        checked = self._known()
        given = None if self.schema is None else checked
        if given is None:
            first = read_file(files_of(Path(self.path))[0], missing=self.missing)
            checked = dataclasses.replace(checked, tasks=stated_tasks(self.labels, first))
        columns = None if given is None else [*given.features, *given.labels, *given.keys]
        read = partial(read_table, schema=checked, columns=columns, missing=self.missing)
        table = read(self.path)
        kind = self.split or self._default_split(given)
        try:
            split = self._split(table, kind, given, 0.0 if self.test_path else self.test)
        except RowError as error:
            raise located_in(files_of(Path(self.path)), error, missing=self.missing) from error
        if not len(split.train):
            raise self._nothing_to_train_on(table, kind, given)
        if self.test_path:
            self._refuse_same_files()
            split = split._replace(test=read(self.test_path))
        notes = [f"split by {kind}"]
        if self.test_path:
            notes += _not_later(split, given.time if given else self.time)
        if given is None:
            given, reasons = infer_schema(
                split.train,
                self.labels,
                user=self.user,
                item=self.item,
                time=self.time,
                weight=self.weight,
                drop=self.drop,
                dim=self.dim,
            )
            notes += map(str, reasons)
        name = Path(self.path).stem
        return RankingTables(name, given, *split, tuple(notes), tuple(self.missing))

    def _nothing_to_train_on(
        self, table: pl.DataFrame, kind: SplitKind, schema: FeatureSchema | None
    ) -> GatesError:
        """Return why a split leaves no training rows, and what to do."""
        time = schema.time if schema else self.time
        column = {"time": time, "user": schema.user if schema else self.user}.get(kind, "")
        cause = f"it has {len(table):,} rows"
        if column:
            cause += f" and {table[column].n_unique():,} values of {column!r}"
        advice = "give it more rows, or smaller fractions of validation and test"
        if kind == "time":
            advice = (
                "split it by user or row, by --data.source.init_args.split row, or name no time"
            )
        return GatesError(
            f"{self.path}: a split by {kind} leaves no row to train on, {cause}: {advice}"
        )

    def _refuse_same_files(self) -> None:
        train_files = {file.resolve() for file in files_of(Path(self.path))}
        for file in files_of(Path(self.test_path)):
            if file.resolve() in train_files:
                raise GatesError(
                    f"{self.path} is tested on itself, {file} is read for both: give a test_path "
                    "with other rows, or none"
                )

    def _known(self) -> FeatureSchema:
        """Return the given schema, or what is known of the drafted one."""
        if self.schema is not None:
            return FeatureSchema.from_dict(self.schema)
        return FeatureSchema(
            tasks=tasks_of(self.labels),
            user=self.user,
            item=self.item,
            time=self.time,
            weight=self.weight,
        )

    def _default_split(self, schema: FeatureSchema | None) -> SplitKind:
        time, user = (schema.time, schema.user) if schema else (self.time, self.user)
        return "time" if time else "user" if user else "row"

    def _split(
        self, table: pl.DataFrame, kind: SplitKind, schema: FeatureSchema | None, test: float
    ) -> Split:
        time, user = (schema.time, schema.user) if schema else (self.time, self.user)
        named = {"time": time, "user": user, "row": "row"}[kind]
        if not named:
            raise GatesError(f"a split by {kind} needs the column of the {kind}: name it")
        if kind == "time":
            return split_by_time(table, time, validation=self.validation, test=test)
        return split_by_hash(
            table, user if kind == "user" else (), validation=self.validation, test=test
        )


def _not_later(split: Split, time: str) -> list[str]:
    """Return a note if rows of another table, which test, are not later than all others."""
    if not time or time not in split.test.columns:
        return []
    earlier = pl.concat([split.train[time], split.validation[time]])
    tested = split.test[time]
    if earlier.dtype.is_numeric() and tested.dtype.is_numeric():
        earlier, tested = earlier.cast(pl.Float64), tested.cast(pl.Float64)
    found, expected = form_of(tested), form_of(earlier)
    if found != expected:
        return [f"{time!r} holds {found} in the test rows, {expected} in all others"]
    count = int((tested <= earlier.max()).sum())
    if not count:
        return []
    return [
        f"{count:,} of {len(tested):,} test rows are not later than all training and validation "
        "rows: what is trained on may know their future"
    ]
