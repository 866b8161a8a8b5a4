"""The simulated feed, split by days: in memory with the true probabilities, or in shards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
import numpy as np
import polars as pl

from core_gates.errors import GatesError, check_at_least, check_option
from recsys.data.tables import RankingTables, split_at
from recsys.schema import Dense, FeatureSchema, Product, Scaling, Sparse
from recsys.transform import FeatureTransform
from video_multitask.feed import LABELS, add_sides, simulated_tasks, with_play_time
from video_multitask.simulator.hidden import DAY_MS, START_MS, WorldSettings
from video_multitask.simulator.log import Simulated, simulate, user_table, video_table
from video_multitask.simulator.world import World
from video_multitask.stream.loader import WINDOW, columns_of
from video_multitask.stream.parquet_stream import ParquetStream
from video_multitask.stream.shards import (
    MANIFEST,
    ROW_GROUP,
    Shards,
    last_days,
    open_shards,
    write_shards,
)

TRUTH = "truth_"
"""Prefix of the columns of true probabilities; no feature and no label has it."""

HEAVY_COUNTS = ("user_play_count", "user_fan_count", "video_show_count", "video_comment_count")
USER, VIDEO = ("user_id", "onehot_feat7"), ("video_id", "author_id", "tag", "upload_type")
Counts = Literal["none", "raw", "normalized"]


class SimulatedFeed:
    """A feed of the simulator: early days train, later ones validate and test.

    Args:
        rows: Rows of the log, spread evenly over the days.
        users: Number of users.
        videos: Number of videos.
        days: Days of the log, at most 31.
        validation_days: Days before the test days.
        test_days: Last days.
        seed: Of the world.
        groups: Whether interactions depend on other factors and fields than watching does.
        heavy_counts: Four heavy-tailed counts as further inputs: ``none``, ``raw`` numbers, as in
            the stress setting, or ``normalized`` like all other inputs.
        permuted: Permute the labels of all rows, together, before anything is computed of them: a
            control in which nothing can be predicted.
        leak: Name of a task whose label, with noise, becomes an input: a planted leak.
        dim: Features of an embedding.
        products: Whether the product of the embeddings of users and videos is an input, too; None
            is no.
        interests: Tastes of a user, of which the one with the larger affinity counts; None is one.
        play_time: Whether the play time over the duration is predicted, of which watch labels are
            thresholds, instead of each label; None is no.
        buckets: Quantiles as which the position and the number of followed users are embedded,
            so that linear models take curves of them; None is scaled logarithms.

    Raises:
        ValueError: A number is too small, there are more than 31 days, or none is left to train on.
    """

    OF_WORLD: ClassVar = ("users", "videos", "days", "seed", "groups", "interests")
    """Arguments that make another world, whose users are others under the same numbers."""

    def __init__(
        self,
        rows: int = 200_000,
        users: int = 2_000,
        videos: int = 3_000,
        days: int = 14,
        validation_days: int = 2,
        test_days: int = 2,
        seed: int = 0,
        groups: bool = False,
        heavy_counts: Counts = "none",
        permuted: bool = False,
        leak: str = "",
        dim: int = 8,
        products: bool | None = None,
        interests: int | None = None,
        play_time: bool | None = None,
        buckets: int | None = None,
    ) -> None:
        check_at_least(1, rows=rows, validation_days=validation_days, test_days=test_days, dim=dim)
        check_option("heavy_counts", heavy_counts, ("none", "raw", "normalized"))
        if leak:
            check_option("leak", leak, LABELS)
        if validation_days + test_days >= days:
            raise ValueError(
                f"{validation_days} validation days and {test_days} test days leave none of "
                f"{days} to train on: give more days"
            )
        self.settings = WorldSettings(
            users, videos, days, seed, groups, heavy_counts != "none", interests or 1
        )
        self.rows, self.users, self.videos, self.days = rows, users, videos, days
        self.validation_days, self.test_days, self.seed = validation_days, test_days, seed
        self.groups, self.heavy_counts = groups, heavy_counts
        self.permuted, self.leak, self.dim, self.products = permuted, leak, dim, products
        self.play_time, self.buckets = play_time, buckets

    def read(self) -> RankingTables:
        """Simulate, join the side tables and split."""
        table = self._table()
        first = START_MS + (self.days - self.test_days) * DAY_MS
        parts = split_at(
            table,
            "time_ms",
            validation_from=first - self.validation_days * DAY_MS,
            test_from=first,
        )
        notes = (
            f"simulated: {self.users} users, {self.videos} videos, {self.days} days; the last "
            f"{self.test_days} test, {self.validation_days} before them validate",
        )
        return RankingTables("simulated feed", self.schema(), *parts, notes=notes)

    def simulated(self) -> Simulated:
        """Return the log with what it was drawn from."""
        return simulate(
            self.rows,
            self.users,
            self.videos,
            self.days,
            self.seed,
            groups=self.groups,
            heavy_counts=self.settings.heavy_counts,
            interests=self.settings.interests,
        )

    def world(self) -> World:
        """Return the world of the log, from which others can be drawn."""
        return World(self.settings)

    def schema(self) -> FeatureSchema:
        """Return eight sparse columns, three numbers and what the options add."""
        scaling: Scaling = "none" if self.heavy_counts == "raw" else "log_standardize"
        counts = HEAVY_COUNTS if self.heavy_counts != "none" else ()
        embedded = self.buckets is not None
        quantiles: Any = {"scaling": "buckets", "buckets": self.buckets} if embedded else {}
        leaked = (Dense("leak", scaling="standardize"),) if self.leak else ()
        return FeatureSchema(
            tasks=with_play_time(simulated_tasks()) if self.play_time else simulated_tasks(),
            sparse=(
                Sparse("user_id", side="user"),
                Sparse("onehot_feat7", side="user"),
                Sparse("video_id", side="item"),
                Sparse("author_id", side="item"),
                Sparse("tag", side="item"),
                Sparse("upload_type", side="item"),
                Sparse("tab"),
                Sparse("hourmin"),
            ),
            dense=(
                Dense("duration_ms", side="item"),
                Dense("position", **quantiles),
                Dense("follow_user_num", side="user", **quantiles),
                *(
                    Dense(n, scaling=scaling, side="user" if "user" in n else "item")
                    for n in counts
                ),
                *leaked,
            ),
            products=(Product(USER, VIDEO),) if self.products else (),
            dim=self.dim,
            user="user_id",
            item="video_id",
            time="time_ms",
        )

    def _table(self) -> pl.DataFrame:
        feed = self.simulated()
        users = feed.users.select("user_id", "onehot_feat7", "follow_user_num")
        videos = feed.videos.select("video_id", "author_id", "tag", "upload_type")
        truth = pl.DataFrame(feed.truth, schema=[f"{TRUTH}{task}" for task in LABELS])
        log, rng = feed.log, np.random.default_rng([self.seed, 6])
        if self.permuted:
            columns = [*LABELS.values(), "play_time_ms"]
            log = log.with_columns(log.select(columns)[rng.permutation(len(log))])
        if self.leak:
            label = log[LABELS[self.leak]].to_numpy()
            log = log.with_columns(leak=label + 0.5 * rng.standard_normal(len(log)))
        keys = [pl.col("user_id").cast(pl.Int64), pl.col("video_id").cast(pl.Int64)]
        joined = log.with_columns(keys).join(
            users.cast({"user_id": pl.Int64}), on="user_id", how="left", maintain_order="left"
        )
        joined = joined.join(
            videos.cast({"video_id": pl.Int64}), on="video_id", how="left", maintain_order="left"
        )
        return pl.concat([joined, truth], how="horizontal")


class SimulatedStream:
    """What `video_multitask.sources.simulated.SimulatedFeed` is, read from Parquet shards.

    Args:
        folder: Of the shards, written by the first training that finds none there; a study
            chooses its own.
        rows: Rows of the log, spread evenly over the days.
        users: Number of users.
        videos: Number of videos.
        days: Days of the log, at most 31.
        validation_days: Days before the test days.
        test_days: Last days.
        seed: Of the world.
        dim: Features of an embedding.
        workers: Reading processes of each rank; 0 reads in the training process.
        window: Rows that are shuffled together in each of them.
        row_group: Rows of a row group.

    Raises:
        ValueError: A number is too small, or no day is left to train on.
    """

    OF_WORLD: ClassVar = ("users", "videos", "days", "seed")
    """Arguments that make another world, whose users are others under the same numbers."""

    def __init__(
        self,
        folder: str = "",
        rows: int = 5_000_000,
        users: int = 20_000,
        videos: int = 30_000,
        days: int = 14,
        validation_days: int = 1,
        test_days: int = 1,
        seed: int = 0,
        dim: int = 8,
        workers: int = 0,
        window: int = WINDOW,
        row_group: int = ROW_GROUP,
    ) -> None:
        check_at_least(0, workers=workers, window=window)
        check_at_least(1, row_group=row_group)
        sizes: dict[str, Any] = {
            "rows": rows, "users": users, "videos": videos, "days": days, "seed": seed,
        }  # fmt: skip
        self._feed = SimulatedFeed(
            **sizes, validation_days=validation_days, test_days=test_days, dim=dim
        )
        self.folder, self.validation_days, self.test_days = folder, validation_days, test_days
        self.rows, self.workers, self.window, self.row_group = rows, workers, window, row_group
        self.source: dict[str, Any] = {"simulated": sizes}
        self._world = WorldSettings(users, videos, days, seed)

    def schema(self) -> FeatureSchema:
        """Return eight sparse columns and three numbers."""
        return self._feed.schema()

    def stream(
        self, batch_size: int, order: str, seed: int, transform: FeatureTransform | None
    ) -> L.LightningDataModule:
        """Return the data module; nothing is read before it is needed."""
        return ParquetStream(
            self._opened,
            partial(last_days, validation=self.validation_days, test=self.test_days),
            self.schema(),
            batch_size=batch_size,
            window=self.window,
            order="time" if order == "given" else "shuffled",
            seed=seed,
            workers=self.workers,
            transform=transform,
            prepare=lambda: self.write(Path(self.folder)) if self.folder else None,
            notes=(f"simulated: {self.rows} rows in shards",),
        )

    def write(self, folder: Path) -> Shards:
        """Write the shards, unless they exist.

        Args:
            folder: Of the shards.

        Raises:
            GatesError: The folder holds another log.
        """
        if (folder / MANIFEST).is_file():
            return self._checked(open_shards(folder))
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise GatesError(f"{folder} exists and holds no shards: name another folder")
        return write_shards(self._rows(), folder, row_group=self.row_group, source=self.source)

    def _rows(self) -> Iterator[pl.DataFrame]:
        world, seed = World(self._world), self._world.seed
        wanted = {*columns_of(self.schema()), "date", "time_ms"}
        sides = (
            user_table(world.hidden, np.random.default_rng([seed, 4])),
            video_table(world.hidden, np.random.default_rng([seed, 5])),
        )
        users, videos = (t.select(n for n in t.columns if n in wanted) for t in sides)
        for chunk in world.stream(self.rows):
            rows = chunk.log.select(n for n in chunk.log.columns if n in wanted)
            yield add_sides(rows, users, videos)

    def _opened(self) -> Shards:
        if not self.folder:
            raise GatesError(
                "the simulated stream has no folder of shards: name one by "
                "--data.source.init_args.folder, where they will be written, or run `evaluate` of "
                "the configuration `stream`"
            )
        return self._checked(open_shards(self.folder))

    def _checked(self, shards: Shards) -> Shards:
        if shards.source != self.source:
            raise GatesError(
                f"{shards.folder} holds another log, {json.dumps(dict(shards.source))}: name "
                "another folder, or give the same sizes and seed"
            )
        return shards
