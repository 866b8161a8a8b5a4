"""A release of KuaiRand that does not fit into memory, from prepared shards: 27K."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import lightning as L

from core_gates.errors import check_at_least, check_option
from recsys.schema import ENCODERS, Encoder, FeatureSchema
from recsys.transform import FeatureTransform
from video_multitask.feed import kuairand_schema
from video_multitask.kuairand.prepare import SPLITS, periods_of
from video_multitask.leaks import check_features
from video_multitask.sources.kuairand import check_prepared, chosen_tasks
from video_multitask.stream.loader import WINDOW, columns_of
from video_multitask.stream.parquet_stream import ParquetStream
from video_multitask.stream.shards import Shards, open_shards


class KuaiRandStream:
    """A public split as a stream of batches, in bounded memory.

    Args:
        folder: Shards that ``gates video prepare`` has written, with its ``--history`` and
            ``--means`` where these options are used here.
        split: See :class:`~video_multitask.sources.kuairand.KuaiRandTables`.
        history: Newest videos of the user, as a sequence; 0 for none.
        encoder: How they become one vector.
        means: Outcomes whose mean over the user's past is a feature.
        ids: Embed users, videos and authors themselves.
        tasks: Behaviors that are predicted; all ten if empty.
        dim: Features of an embedding.
        workers: Reading processes of each rank; 0 reads in the training process.
        window: Rows that are shuffled together in each of them.
        scored: Fraction of the users whose rows validate and test, since those rows are in memory
            for ``tune`` and ``evaluate``.

    Raises:
        ValueError: A number is too small, or the split, the encoder or a task is unknown.
    """

    def __init__(
        self,
        folder: str,
        split: str = "standard",
        history: int = 0,
        encoder: Encoder = "mean",
        means: Sequence[str] = (),
        ids: bool = True,
        tasks: Sequence[str] = (),
        dim: int = 16,
        workers: int = 0,
        window: int = WINDOW,
        scored: float = 0.02,
    ) -> None:
        check_at_least(0, history=history, workers=workers, window=window)
        check_at_least(1, dim=dim)
        check_option("split", split, SPLITS)
        check_option("encoder", encoder, ENCODERS)
        self.folder, self.split, self.dim, self.ids = folder, split, dim, ids
        self.history, self.encoder, self.means = history, encoder, tuple(means)
        self.workers, self.window, self.scored = workers, window, scored
        self.tasks = chosen_tasks(tasks)

    def schema(self) -> FeatureSchema:
        """Return the fields of user, video and context, and what the user did before."""
        return kuairand_schema(
            self.dim,
            ids=self.ids,
            history=self.history,
            encoder=self.encoder,
            means=self.means,
            tasks=self.tasks,
        )

    def stream(
        self, batch_size: int, order: str, seed: int, transform: FeatureTransform | None
    ) -> L.LightningDataModule:
        """Return the data module; nothing is read before it is needed."""
        schema = self.schema()
        check_features(schema)
        return ParquetStream(
            partial(_opened, Path(self.folder), columns_of(schema)),
            periods_of(self.split),
            schema,
            batch_size=batch_size,
            window=self.window,
            order="time" if order == "given" else "shuffled",
            seed=seed,
            workers=self.workers,
            transform=transform,
            scored=self.scored,
            notes=(
                f"KuaiRand, split {self.split}; rows of {self.scored:.0%} of the users validate "
                "and test",
            ),
        )


def _opened(folder: Path, wanted: Sequence[str]) -> Shards:
    shards = open_shards(folder)
    check_prepared(folder, shards.columns, wanted)
    return shards
