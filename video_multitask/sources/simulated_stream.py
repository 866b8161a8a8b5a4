"""The simulated feed in shards: any number of rows, in bounded memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import numpy as np
import polars as pl

from core_gates.errors import GatesError, check_at_least
from recsys.schema import FeatureSchema
from recsys.transform import FeatureTransform
from video_multitask.simulator.hidden import WorldSettings
from video_multitask.simulator.log import user_table, video_table
from video_multitask.simulator.world import World
from video_multitask.sources.simulated import SimulatedFeed
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


class SimulatedStream:
    """What :class:`~video_multitask.sources.simulated.SimulatedFeed` is, read from Parquet shards.

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
            for side, key in ((users, "user_id"), (videos, "video_id")):
                typed = side.cast({key: rows.schema[key]})
                rows = rows.join(typed, on=key, how="left", maintain_order="left")
            yield rows

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
