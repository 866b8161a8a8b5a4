"""Click and conversion in the AliExpress search, as MTReclib publishes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from core_gates.errors import GatesError, check_at_least
from recsys.data.readers.files import read_table
from recsys.data.tables import RankingTables, split_by_hash
from recsys.schema import Dense, FeatureSchema, Sparse, Task

CATEGORICAL = 16
LABELS = ("click", "conversion")
SEED = 5


@dataclass(frozen=True)
class AliExpress:
    """One country of the data set, in the layout of MTReclib.

    Columns by their place: an index, 16 categorical ones, then numbers, and last the labels
    ``click`` and ``conversion``; conversion counts in all rows, as published. Categories of the
    test file that training lacks are *unknown*, where the published loader fails.

    The published code chooses models by the test file; here a fraction of the training rows
    validates instead.

    Attributes:
        path: Folder with ``train.csv`` and ``test.csv``, or the same as Parquet.
        validation: Fraction of the training rows, about.
        dim: Features of an embedding.
    """

    path: str
    validation: float = 0.1
    dim: int = 8

    def __post_init__(self) -> None:
        """Refuse embeddings without features."""
        check_at_least(1, dim=self.dim)

    def read(self) -> RankingTables:
        """Return the three parts.

        Raises:
            GatesError: A file is absent, or has other columns.
        """
        train, test = (self._file(name) for name in ("train", "test"))
        if train.columns != test.columns:
            raise GatesError(
                f"{self.path}: the test file has columns {', '.join(test.columns[:4])} …, the "
                f"training file {', '.join(train.columns[:4])} …: take both from one download"
            )
        features = train.columns[:-2]
        schema = FeatureSchema(
            tasks=(Task("click"), Task("conversion")),
            sparse=tuple(Sparse(name) for name in features[:CATEGORICAL]),
            dense=tuple(Dense(name) for name in features[CATEGORICAL:]),
            dim=self.dim,
        )
        split = split_by_hash(train, validation=self.validation, test=0.0, seed=SEED)
        notes = (
            f"{self.validation:.0%} of the training file, by the hash of the row number, validate",
        )
        return RankingTables("aliexpress", schema, split.train, split.validation, test, notes)

    def _file(self, name: str) -> pl.DataFrame:
        """Return a file without its index, the last two columns named as labels."""
        folder = Path(self.path)
        choices = [folder / f"{name}{suffix}" for suffix in (".csv", ".parquet")]
        path = next((path for path in choices if path.exists()), None)
        if path is None:
            raise GatesError(
                f"{folder} lacks {choices[0].name}: name the folder of a country, such as "
                "AliExpress_NL, with train.csv and test.csv"
            )
        table = read_table(path)
        first = table[table.columns[0]] if table.columns else pl.Series()
        if first.dtype.is_integer() and (first == pl.int_range(len(first), eager=True)).all():
            table = table.drop(first.name)  # an index; without a name, read_csv has left it out
        if len(table.columns) < CATEGORICAL + 3:
            raise GatesError(
                f"{path} has {len(table.columns)} columns besides its index, expected "
                f"{CATEGORICAL} categorical ones, numbers and {' and '.join(LABELS)}"
            )
        names = [*table.columns[:-2], *LABELS]
        if len(set(names)) < len(names):
            raise GatesError(f"{path}: click and conversion are not its last columns")
        table.columns = names
        return table
