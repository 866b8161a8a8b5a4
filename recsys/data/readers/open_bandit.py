"""The Open Bandit log of a fashion store: clicks, and the probability that an item was shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import polars as pl

from core_gates.errors import GatesError, check_at_least, check_option
from recsys.columns.canonical import RowError
from recsys.data.readers.files import read_table
from recsys.data.tables import RankingTables, split_by_time
from recsys.schema import FeatureSchema, Sparse, Task

Policy = Literal["random", "bts", "all"]

COLUMNS = ("timestamp", "item_id", "position", "click", "propensity_score")
USER = tuple(f"user_feature_{number}" for number in range(4))
TIME, PROPENSITY = "time_ms", "propensity_score"


@dataclass(frozen=True)
class OpenBandit:
    """Logs of a uniformly random policy and of Bernoulli Thompson sampling (Saito et al., 2021).

    Task: ``click``. Features: four hashed columns of the user, item and position. The propensity
    of every row stays in the tables, for off-policy estimates, but not among the features.

    Attributes:
        path: Parquet or CSV file, such as ``open_bandit_all.parquet``; files of the release, which
            lack the column ``policy``, are one policy each.
        policy: Rows of which policy; ``all`` for both.
        validation: Fraction of the rows, those before the test part.
        test: Fraction of the rows, the last ones.
        dim: Features of an embedding.
    """

    path: str
    policy: Policy = "all"
    validation: float = 0.1
    test: float = 0.2
    dim: int = 8

    def __post_init__(self) -> None:
        """Refuse an unknown policy, and embeddings without features."""
        check_at_least(1, dim=self.dim)
        check_option("policy", self.policy, ("random", "bts", "all"))

    def read(self) -> RankingTables:
        """Return the three parts.

        Raises:
            GatesError: The file is absent, lacks a column or rows of the policy.
            RowError: A time cannot be read, or a propensity is not in (0, 1].
        """
        table = self.log()
        split = split_by_time(table, TIME, validation=self.validation, test=self.test)
        schema = FeatureSchema(
            tasks=(Task("click"),),
            sparse=(
                *(Sparse(name, side="user") for name in USER),
                Sparse("item_id", side="item"),
                Sparse("position"),
            ),
            dim=self.dim,
            item="item_id",
            time=TIME,
        )
        return RankingTables("open_bandit", schema, *split, (f"policy {self.policy}, by time",))

    def log(self) -> pl.DataFrame:
        """Return all rows of the policy in their order, with ``time_ms`` (Unix milliseconds).

        Raises:
            GatesError: See `read`.
        """
        table = read_table(self.path, columns=[*COLUMNS, *USER])
        if self.policy != "all":
            if "policy" not in table.columns:
                raise GatesError(
                    f"{self.path} has no column 'policy': a file of one policy is read with policy "
                    "all"
                )
            table = table.filter(pl.col("policy") == self.policy)
            if not len(table):
                raise GatesError(f"{self.path} has no row of policy {self.policy}")
        times = _milliseconds(table["timestamp"], self.path)
        wrong = ~(table[PROPENSITY].is_between(0, 1, closed="right").fill_null(False))
        if wrong.any():
            row = int(wrong.arg_max() or 0)
            propensity = table[PROPENSITY][row]
            raise RowError(
                PROPENSITY, row, f"it is {propensity}, expected a number in (0, 1]", self.path
            )
        return table.with_columns(times.alias(TIME))


def _milliseconds(column: pl.Series, path: str) -> pl.Series:
    """Return times of the log, such as ``2019-11-24 00:00:34.762830+00:00``, as integers."""
    if column.dtype == pl.String:
        read = column.str.to_datetime("%Y-%m-%d %H:%M:%S%.f%:z", strict=False, time_unit="us")
        if (unread := read.is_null()).any():
            row = int(unread.arg_max() or 0)
            raise RowError("timestamp", row, f"{column[row]!r} is no time in ISO 8601", path)
        column = read
    return column.dt.epoch("ms")
