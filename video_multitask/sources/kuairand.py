"""KuaiRand in its public splits: Pure and 1K in memory, 27K as a stream of prepared shards."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path

import lightning as L
import polars as pl

from core_gates.errors import GatesError, check_at_least, check_option
from recsys.data.tables import RankingTables, Split
from recsys.schema import ENCODERS, Encoder, FeatureSchema, Task
from recsys.transform import FeatureTransform
from video_multitask.feed import (
    KUAIRAND,
    add_context,
    add_labels,
    add_sides,
    kuairand_schema,
    kuairand_tasks,
)
from video_multitask.history import UserHistory
from video_multitask.kuairand.folder import ALL, KuaiRand
from video_multitask.kuairand.prepare import SPLITS, periods_of, split_log
from video_multitask.kuairand.releases import Count, Part, check_counts
from video_multitask.leaks import check_features
from video_multitask.stream.loader import WINDOW, columns_of
from video_multitask.stream.parquet_stream import ParquetStream
from video_multitask.stream.shards import MANIFEST, Shards, open_shards

CONTEXT = ("date", "hourmin", "duration_ms", "is_rand", "tag", "upload_dt")
"""Columns that splits and context features are made of."""


class _Kind:
    """What both kinds of source are told of a split and of its features."""

    def _choose(
        self,
        split: str,
        history: int,
        encoder: Encoder,
        means: Sequence[str],
        ids: bool,
        tasks: Sequence[str],
        dim: int,
    ) -> None:
        check_at_least(0, history=history)
        check_at_least(1, dim=dim)
        check_option("split", split, SPLITS)
        check_option("encoder", encoder, ENCODERS)
        self.split, self.history, self.encoder, self.means = split, history, encoder, tuple(means)
        self.ids, self.tasks, self.dim = ids, chosen_tasks(tasks), dim

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


class KuaiRandTables(_Kind):
    """A public split of a release, with the task groups ``watch``, ``inter`` and ``neg``.

    What a user did before comes from all logs of the release, strictly earlier rows only, so that
    ``standard`` and ``unbiased`` test rows have the same histories. The counts of the logs are
    compared with the published ones.

    Args:
        path: Folder of a release, one log, or a folder of shards that ``gates video prepare`` has
            written.
        split: ``standard``: recommended videos of 22 April to 8 May test; ``unbiased``: random
            videos of the same days, with the same training rows; ``random_in``: random videos
            alone, in time order.
        history: Newest videos of the user, as a sequence; 0 for none.
        encoder: How they become one vector.
        means: Outcomes whose mean over the user's past is a feature, such as ``is_click``.
        ids: Embed users, videos and authors themselves.
        tasks: Behaviors that are predicted; all ten if empty.
        dim: Features of an embedding.
        strict: Refuse a release whose counts are not those published, instead of a warning.
        drop_invalid: Leave out rows with wrong values, instead of refusing the file.

    Raises:
        ValueError: A number is too small, or the split, the encoder or a task is unknown.
    """

    def __init__(
        self,
        path: str,
        split: str = "standard",
        history: int = 0,
        encoder: Encoder = "mean",
        means: Sequence[str] = (),
        ids: bool = True,
        tasks: Sequence[str] = (),
        dim: int = 16,
        strict: bool = False,
        drop_invalid: bool = False,
    ) -> None:
        self._choose(split, history, encoder, means, ids, tasks, dim)
        self.path, self.strict, self.drop_invalid = path, strict, drop_invalid

    def read(self) -> RankingTables:
        """Return the parts of the split.

        Raises:
            GatesError: A file has a fault, a part has no rows, or a feature is known too late.
        """
        schema = self.schema()
        check_features(schema)
        path = Path(self.path)
        prepared = (path / MANIFEST).is_file()
        release, parts = self._prepared(path) if prepared else self._raw(path)
        days = ", ".join(
            f"{period.first} … {period.last}{' random' if period.random else ''}"
            for period in periods_of(self.split)
        )
        note = f"KuaiRand-{release or path.stem}, split {self.split}: {days}"
        return RankingTables("kuairand", schema, *parts, notes=(note,))

    def _raw(self, path: Path) -> tuple[str, Split]:
        data = KuaiRand(path, drop_invalid=self.drop_invalid)
        log = add_labels(self._log(data).sort("time_ms", maintain_order=True))
        if self.history or self.means:
            log = UserHistory(self.history, ("video_id",), self.means).add(log)
        wanted = {*columns_of(self.schema()), *CONTEXT, "user_id", "video_id", "time_ms"}
        log = log.select(n for n in log.columns if n in wanted)
        users, videos = (
            None if table is None else table.select(n for n in table.columns if n in wanted)
            for table in (data.users(), data.videos())
        )
        parts = split_log([log], self.split)
        return data.release, Split(*(add_context(add_sides(p, users, videos)) for p in parts))

    def _log(self, data: KuaiRand) -> pl.DataFrame:
        """Return all logs of a release, after comparing their counts with the published ones."""
        logs: dict[Part, pl.DataFrame] = {}
        for part in ALL:
            if rows := list(data.log([part])):
                logs[part] = pl.concat(rows)
        if data.release:
            groups: dict[str, tuple[Part, ...]] = {
                "standard": ("first", "second"),
                "random": ("random",),
            }
            for which, names in groups.items():
                if present := [logs[name] for name in names if name in logs]:
                    both = pl.concat([log.select("user_id", "video_id") for log in present])
                    users, videos = (both[name].n_unique() for name in both.columns)
                    count = Count(users, videos, len(both))
                    check_counts(data.release, which, count, self.path, strict=self.strict)
        return pl.concat(list(logs.values()))

    def _prepared(self, path: Path) -> tuple[str, Split]:
        shards, wanted = open_shards(path, verify=True), columns_of(self.schema())
        check_prepared(path, shards.columns, wanted)
        parts = [period.of(shards).parts(wanted) for period in periods_of(self.split)]
        return str(shards.source.get("release", "")), Split(*map(pl.concat, parts))


def chosen_tasks(names: Sequence[str]) -> tuple[Task, ...]:
    """Return tasks of KuaiRand by their names, all if none is named.

    Raises:
        ValueError: A name is unknown.
    """
    for name in names:
        check_option("task", name, KUAIRAND)
    return tuple(task for task in kuairand_tasks() if not names or task.name in names)


def check_prepared(path: Path, columns: Collection[str], wanted: Sequence[str]) -> None:
    """Refuse shards that lack a column of the schema.

    Raises:
        GatesError: They do; the option of ``prepare`` that would add it is named.
    """
    if missing := [name for name in wanted if name not in columns]:
        past = any(name.startswith("past_") for name in missing)
        how = "with --history and --means" if past else "from the whole release"
        raise GatesError(
            f"the shards {path} lack the columns {', '.join(missing[:5])}: prepare them again {how}"
        )


class KuaiRandStream(_Kind):
    """A public split as a stream of batches, in bounded memory.

    Args:
        folder: Shards that ``gates video prepare`` has written, with its ``--history`` and
            ``--means`` where these options are used here.
        split: See `KuaiRandTables`.
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
        self._choose(split, history, encoder, means, ids, tasks, dim)
        self.folder, self.workers, self.window, self.scored = folder, workers, window, scored

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
