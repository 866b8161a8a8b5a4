"""MovieLens with two targets: whether a user has watched a movie, and likes it."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from core_gates.errors import GatesError, check_at_least
from recsys.columns.canonical import RowError
from recsys.data.readers.files import read_table
from recsys.data.tables import RankingTables, split_by_hash
from recsys.schema import FeatureSchema, Product, Sparse, Task

COLUMNS = ("user_id", "movie_id", "rating", "has_watched")
LIKED = 4
SEED = 1


@dataclass(frozen=True)
class MovieLens:
    """Pairs of user and movie, of which half were watched and half drawn as negatives.

    Tasks: ``watched``; ``liked``, a rating of 4 or 5, which counts only where the movie was
    watched. Features: user, movie and the product of their embeddings.

    The rows are those of the COMET benchmark (Hazimeh et al., 2023) whose features were published:
    its validation part trains, but for a fraction by hash that validates; its test part tests. The
    terms of GroupLens allow research and no redistribution: nothing of the data may be shipped.

    Attributes:
        path: ``movielens1m_watch_rating.parquet``.
        validation: Fraction of the rows that are not tested, about.
        dim: Features of an embedding.
    """

    path: str
    validation: float = 0.1
    dim: int = 16

    def __post_init__(self) -> None:
        """Refuse embeddings without features."""
        check_at_least(1, dim=self.dim)

    def read(self) -> RankingTables:
        """Return the three parts.

        Raises:
            GatesError: The file is absent, lacks a column or a part.
            RowError: A rating is not 1 to 5 where the movie was watched, and 0 elsewhere.
        """
        table = read_table(self.path, columns=[*COLUMNS, "comet_part"])
        watched, rating = table["has_watched"] == 1, table["rating"]
        wrong = (watched & ~rating.is_between(1, 5)) | (~watched & (rating != 0))
        if wrong.fill_null(True).any():
            row = int(wrong.fill_null(True).arg_max() or 0)
            problem = f"it is {rating[row]}, expected 1 to 5 where watched and 0 elsewhere"
            raise RowError("rating", row, problem, self.path)
        table = table.with_columns(
            watched.cast(pl.Int8).alias("watched"),
            (rating >= LIKED).cast(pl.Int8).alias("liked"),
        )
        parts = {name: table.filter(pl.col("comet_part") == name) for name in ("val", "test")}
        if empty := [name for name, part in parts.items() if not len(part)]:
            raise GatesError(f"{self.path} has no rows of comet_part {empty[0]!r}: get it again")
        split = split_by_hash(
            parts["val"], ("user_id", "movie_id"), validation=self.validation, test=0.0, seed=SEED
        )
        schema = FeatureSchema(
            tasks=(
                Task("watched", category="watch"),
                Task("liked", category="rating", mask="watched"),
            ),
            sparse=(Sparse("user_id", side="user"), Sparse("movie_id", side="item")),
            products=(Product(("user_id",), ("movie_id",)),),
            dim=self.dim,
            user="user_id",
            item="movie_id",
        )
        notes = (
            "liked counts where the movie was watched",
            "GroupLens allows research only: ship neither rows nor weights",
        )
        return RankingTables(
            "movielens", schema, split.train, split.validation, parts["test"], notes
        )
