"""Census-Income (KDD) of the UCI repository: income and marital status of a person."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from core_gates.errors import GatesError, check_at_least
from recsys.data.readers.files import read_table
from recsys.data.tables import RankingTables, split_by_hash
from recsys.schema import Dense, FeatureSchema, Sparse, Task

NUMBERS = (
    "age",
    "wage_per_hour",
    "capital_gains",
    "capital_losses",
    "stock_dividends",
    "num_emp",
    "weeks_worked",
)
WEIGHT = "instance_weight"
INCOME, STATUS = "income_50k", "marital_stat"
INCOMES = {"- 50000.": 0, "50000+.": 1}
SEED = 2408


@dataclass(frozen=True)
class Census:
    """The pair of tasks that multi-task experts were introduced with (Ma et al., KDD 2018).

    Tasks: ``income_50k``, an income above 50,000 dollars; ``never_married``. All other columns are
    features but ``instance_weight``, the number of people that a row stands for, which the
    published experiments leave out.

    Rows are split by the hash of their number, 70 % to train, 10 % to validate and 20 % to test:
    the file has neither persons nor times that could keep rows together.

    Attributes:
        path: Parquet or CSV file with the 42 columns named, such as
            ``census_income_kdd_test.parquet``.
        validation: Fraction of the rows, about.
        test: Fraction of the rows, about.
        dim: Features of an embedding.
    """

    path: str
    validation: float = 0.1
    test: float = 0.2
    dim: int = 8

    def __post_init__(self) -> None:
        """Refuse embeddings without features."""
        check_at_least(1, dim=self.dim)

    def read(self) -> RankingTables:
        """Return the three parts.

        Raises:
            GatesError: The file is absent, lacks a column, has another income, or numbers for
                the marital status.
        """
        table = read_table(self.path, columns=[*NUMBERS, INCOME, STATUS])
        incomes = table[INCOME].cast(pl.String).str.strip_chars()
        if strangers := sorted(set(incomes.unique().drop_nulls()) - set(INCOMES)):
            raise GatesError(
                f"{self.path}: column {INCOME!r} has {strangers[0]!r}, expected "
                f"{' or '.join(map(repr, INCOMES))}"
            )
        if table[STATUS].dtype.is_numeric():
            raise GatesError(
                f"{self.path}: column {STATUS!r} holds {table[STATUS].dtype}, expected words, such "
                "as 'Never married'"
            )
        table = table.with_columns(
            incomes.replace_strict(INCOMES, return_dtype=pl.Int8).alias(INCOME),
            (pl.col(STATUS).cast(pl.String).str.strip_chars() == "Never married")
            .cast(pl.Int8)
            .alias("never_married"),
        ).drop(STATUS, WEIGHT, strict=False)
        tasks = Task(INCOME, category="income"), Task("never_married", category="family")
        labels = {task.name for task in tasks}
        schema = FeatureSchema(
            tasks=tasks,
            sparse=tuple(Sparse(n) for n in table.columns if n not in {*NUMBERS, *labels}),
            dense=tuple(Dense(name) for name in NUMBERS),
            dim=self.dim,
        )
        split = split_by_hash(table, validation=self.validation, test=self.test, seed=SEED)
        notes = (
            f"rows are split by the hash of their number: {self.test:.0%} test, "
            f"{self.validation:.0%} validation",
            f"{WEIGHT} is left out, as in the published experiments",
        )
        return RankingTables("census", schema, *split, notes)
