"""The data module of logs that are larger than memory.

Learning vocabularies and scales takes a pass over all training days. They are kept next to the
shards: what is learned depends on those days and on how the schema reads its columns, not on
embeddings or tasks, so one folder serves many networks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import polars as pl

from core_gates.errors import GatesError, check_at_least
from harness.files import Data, short_digest
from recsys.data.datamodule import PartsDataModule
from recsys.data.tables import PARTS, Part
from recsys.inputs import Batch
from recsys.schema import FeatureSchema
from recsys.transform import FeatureTransform
from video_multitask.stream.loader import (
    WINDOW,
    EvaluationStream,
    Order,
    StreamLoader,
    StreamPlan,
    columns_of,
    some_users,
)
from video_multitask.stream.shards import Periods, Shards

FOLDER = ".transforms"
"""In the folder of the shards; hidden, since their content does not include it."""

_LEARNED = {
    "sparse": ("name", "min_count", "storage", "buckets", "table", "part"),
    "dense": ("name", "scaling", "buckets"),
    "crossed": ("of", "buckets"),
    "sequences": ("name", "of"),
}


def place_of(train: Shards, schema: FeatureSchema) -> Path:
    """Return the folder of what a schema learns from training shards, whether it exists or not."""
    values = schema.to_dict()
    learned: dict[str, Any] = {
        kind: [{name: entry[name] for name in names} for entry in values[kind]]
        for kind, names in _LEARNED.items()
    }
    learned |= {"time": schema.time, "files": {f.name: f.sha256 for f in train.files}}
    return train.folder / FOLDER / short_digest(learned)


def store(train: Shards, transform: FeatureTransform) -> Path:
    """Keep a transform that was fitted to training shards; return its folder."""
    return transform.save(place_of(train, transform.schema))


def load_stored(train: Shards, schema: FeatureSchema) -> FeatureTransform | None:
    """Return the transform that was kept for these training shards and a schema, None if none was.

    Raises:
        GatesError: It is damaged.
    """
    place = place_of(train, schema)
    if not place.is_dir():
        return None
    stored, made = FeatureTransform.load(place), FeatureTransform(schema)
    made.tables, made.scalers, made.fitted = stored.tables, stored.scalers, stored.fitted
    return made


class ParquetStream(PartsDataModule):
    """Batches of Parquet shards, in bounded memory, that resume at the exact next one.

    Row groups are distributed over ranks and workers, rows shuffled within a window; see
    `video_multitask.stream.loader.StreamPlan`. Vocabularies and scales are learned from the
    training days alone, in one pass, unless a transform is given or was kept next to the shards.

    Args:
        shards: The whole log, labelled and joined; or what opens it when it is needed.
        periods: Which days train, validate and test; or what chooses them.
        schema: Features and tasks; not needed with a transform.
        batch_size: Training rows of a step over all ranks.
        window: Rows that are shuffled together.
        order: Row groups in ``time`` order, or ``shuffled`` in each epoch.
        seed: Of the order.
        workers: Reading processes of each rank; 0 reads in the training process.
        transform: A fitted ``FeatureTransform``, such as that of a network that is trained further.
        scored: Fraction of the users whose rows validate and test.
        prepare: Writes the shards where they are missing; called on one rank before the training.
        notes: What a reader should know about the data.

    Raises:
        ValueError: A size is below 1, a fraction is none, or there is neither schema nor transform.
    """

    def __init__(
        self,
        shards: Shards | Callable[[], Shards],
        periods: Periods | Callable[[Shards], Periods],
        schema: FeatureSchema | None = None,
        *,
        batch_size: int = 1024,
        window: int = WINDOW,
        order: Order = "time",
        seed: int = 0,
        workers: int = 0,
        transform: FeatureTransform | None = None,
        scored: float = 1.0,
        prepare: Callable[[], object] | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        check_at_least(1, batch_size=batch_size)
        check_at_least(0, workers=workers)
        if not 0 < scored <= 1:
            raise ValueError(f"scored is {scored}; give a fraction of the users, such as 0.1")
        if schema is None and transform is None:
            raise ValueError("the stream needs a schema, or a fitted transform, which has one")
        self._shards, self._periods, self._prepare = shards, periods, prepare
        if schema is None:
            assert transform is not None
            schema = transform.schema
        self.schema = schema
        self.batch_size, self.window, self.order = batch_size, window, order
        self.seed, self.workers, self.scored, self.notes = seed, workers, scored, notes
        self._transform = transform

    @cached_property
    def shards(self) -> Shards:
        """The whole log.

        Raises:
            GatesError: The shards are missing or damaged.
        """
        return self._shards if isinstance(self._shards, Shards) else self._shards()

    @cached_property
    def parts(self) -> dict[Part, Shards]:
        """Shards of each part.

        Raises:
            GatesError: A period has no rows.
        """
        periods = self._periods if isinstance(self._periods, Periods) else None
        chosen = self._periods(self.shards) if periods is None else periods  # type: ignore[operator]
        return {part: source.of(self.shards) for part, source in zip(PARTS, chosen, strict=True)}

    @property
    def transform(self) -> FeatureTransform:
        """The transform, fitted on the training days once."""
        if self._transform is None:
            train = self.parts["train"]
            self._transform = load_stored(train, self.schema)
            if self._transform is None:
                made = FeatureTransform(self.schema)
                self._transform = made.fit_batches(train.parts(columns_of(self.schema)))
        return self._transform

    def keep_transform(self) -> FeatureTransform:
        """Return the transform, after keeping it next to the shards, where others find it."""
        if load_stored(self.parts["train"], self.schema) is None:
            store(self.parts["train"], self.transform)
        return self.transform

    def prepare_data(self) -> None:
        """Write shards that are missing, where the source can."""
        if self._prepare is not None:
            self._prepare()

    def setup(self, stage: str) -> None:  # noqa: ARG002
        """Fit the transform, if it is not given.

        Raises:
            GatesError: No row of the validation or test days belongs to a user that is scored.
        """
        self.transform  # noqa: B018
        for part in PARTS[1:]:
            self._require_scored(part)

    def _require_scored(self, part: Part) -> None:
        user, fraction = self.schema.user, self.scored
        if fraction == 1 or user is None:
            return
        if not any(len(some_users(t, user, fraction)) for t in self.parts[part].parts([user])):
            raise GatesError(
                f"no row of the {part} days is of the {fraction:.3g} of the users that are scored: "
                "raise data.source.init_args.scored"
            )

    def digest(self) -> list[Data]:
        """Describe the rows of each part by the hashes of their files."""
        return [
            Data(
                shards.folder.name,
                part,
                short_digest({file.name: file.sha256 for file in shards.files}, 64),
                shards.rows,
                "rows",
            )
            for part, shards in self.parts.items()
        ]

    def training_objects(self) -> list[str]:
        """Return a short hash of each file of the training days."""
        return [file.sha256[:12] for file in self.parts["train"].files]

    def table(self, part: Part) -> pl.DataFrame:
        """Return the raw rows of a part in memory, those of `batch`."""
        fraction = 1.0 if part == "train" else self.scored
        tables = self.parts[part].parts(columns_of(self.schema))
        return pl.concat([some_users(table, self.schema.user, fraction) for table in tables])

    def batch(self, part: Part) -> Batch:
        """Return all rows of a part, or those of the users that are scored, as one batch."""
        fraction = 1.0 if part == "train" else self.scored
        return Batch.cat(list(EvaluationStream(self.parts[part], self.transform, users=fraction)))

    def train_dataloader(self) -> StreamLoader:
        """Return the training batches of this rank.

        Raises:
            GatesError: The batch size is not a multiple of the ranks, or there are too few rows.
        """
        rank, world = self._rank()
        if self.batch_size % world:
            raise GatesError(
                f"batch_size {self.batch_size} cannot be split evenly by {world} processes: choose "
                f"a multiple of {world}"
            )
        shards = self.parts["train"]
        plan = StreamPlan(
            tuple(shards.groups),
            world * max(1, self.workers),
            self.batch_size // world,
            self.window,
            self.order,
            self.seed,
        )
        return StreamLoader(
            shards, self.transform, plan, rank=rank, world=world, workers=self.workers
        )

    def evaluation_loader(self, part: Part) -> EvaluationStream:
        """Return the rows of a part that are scored, those of this rank."""
        rank, world = self._rank()
        return EvaluationStream(
            self.parts[part],
            self.transform,
            rank=rank,
            world=world,
            workers=self.workers,
            users=self.scored,
        )
