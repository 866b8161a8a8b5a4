"""What a user did strictly before each row: the last events as lists, means and counts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from core_gates.errors import GatesError, check_at_least

PREFIX = "past_"
"""Prefix of lists and means; ``past_count`` is the number of earlier rows."""

_FRESH = "is of this part"

Ints = NDArray[np.int64]


class UserHistory:
    """Causal features of logs that come in time order, part by part, with bounded state.

    For each row it adds, from rows of the same user with a time strictly below the row's: the list
    of the last values of some columns, newest last, ``past_NAME``; the mean of others since the
    user's first row, ``past_mean_NAME``, null before it; and ``past_count``. Rows at the very same
    time know nothing of each other, whatever their order.

    Between parts it keeps the last ``length`` rows of each user and one number for each mean. All
    rows of a part must be later than those of the parts before.

    Args:
        length: Newest events that lists hold.
        lists: Columns whose last values are listed.
        means: Numeric columns whose running mean is added; null and NaN are not counted.
        user: Column of the user.
        time: Column of the time.

    Raises:
        ValueError: ``length`` is negative.
    """

    def __init__(
        self,
        length: int,
        lists: Sequence[str] = ("video_id",),
        means: Sequence[str] = (),
        *,
        user: str = "user_id",
        time: str = "time_ms",
    ) -> None:
        check_at_least(0, length=length)
        self.length, self.lists, self.means = length, tuple(lists), tuple(means)
        self.user, self.time = user, time
        self._events: pl.DataFrame | None = None
        self._totals: pl.DataFrame | None = None
        self._latest: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Columns that are added."""
        return (
            *(f"{PREFIX}{name}" for name in self.lists),
            *(f"{PREFIX}mean_{name}" for name in self.means),
            f"{PREFIX}count",
        )

    def add(self, part: pl.DataFrame) -> pl.DataFrame:
        """Return a part with its features, rows in their order, and remember it.

        Raises:
            GatesError: A column is missing, or a row is not later than the parts before.
        """
        needed = tuple(dict.fromkeys((self.user, self.time, *self.lists, *self.means)))
        if missing := [name for name in needed if name not in part.columns]:
            raise GatesError(f"the log lacks {', '.join(missing)}, which its history is made of")
        self._check_order(part)
        events = part.select(*needed, pl.lit(True).alias(_FRESH))
        if self._events is not None:
            events = pl.concat([self._events, events])
        rows = events.select(pl.arg_sort_by(self.user, self.time, maintain_order=True))
        order = rows.to_series().to_numpy().astype(np.int64)
        ordered = events[order]
        start, tie, end = _segments(ordered, self.user, self.time)
        place = np.empty(len(order), dtype=np.int64)
        place[order] = np.arange(len(order))
        part_places = place[len(events) - len(part) :]
        added = self._last_values(ordered, start[part_places], tie[part_places])
        added |= self._running_means(part, ordered, start, part_places, tie[part_places])
        kept = end - np.arange(len(ordered)) <= self.length
        self._events = ordered.filter(kept).with_columns(pl.lit(False).alias(_FRESH))
        self._add_totals(part)
        return part.with_columns(**added)

    def _check_order(self, part: pl.DataFrame) -> None:
        if not len(part):
            return
        ends = part.select(first=pl.min(self.time), last=pl.max(self.time))
        first, last = map(int, ends.row(0))
        if self._latest is not None and first <= self._latest:
            raise GatesError(
                f"a row at {self.time} {first} comes after one at {self._latest}; parts must be in "
                "time order, without ties between them"
            )
        self._latest = last

    def _last_values(self, ordered: pl.DataFrame, start: Ints, tie: Ints) -> dict[str, pl.Series]:
        first = np.maximum(start, tie - self.length)
        sizes = tie - first
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        taken = np.repeat(first - offsets[:-1], sizes) + np.arange(offsets[-1])
        added = {}
        for name in self.lists:
            values = ordered[name].gather(taken).to_arrow()
            lists = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), values)
            added[PREFIX + name] = pl.Series(PREFIX + name, lists)
        return added

    def _running_means(
        self, part: pl.DataFrame, ordered: pl.DataFrame, start: Ints, part_places: Ints, tie: Ints
    ) -> dict[str, pl.Series]:
        """Return what happened before the part, from totals, plus what is earlier within it."""
        before = part.select(self.user)
        if self._totals is not None:
            before = before.join(self._totals, on=self.user, how="left", maintain_order="left")
        fresh = ordered[_FRESH].to_numpy()

        def earlier(values: NDArray[np.float64], total: str) -> NDArray[np.float64]:
            rows = pl.DataFrame({"user": start, "value": np.where(fresh, values, 0.0)})
            sums = rows.select(pl.col("value").cum_sum().over("user")).to_series().to_numpy()
            within = np.where(tie > start[part_places], sums[tie - 1], 0.0)
            if total not in before.columns:
                return within
            return within + before[total].fill_null(0.0).to_numpy()

        added = {}
        for name in self.means:
            column = ordered[name].cast(pl.Float64).fill_nan(None)
            total = earlier(column.fill_null(0.0).to_numpy(), f"sum {name}")
            count = earlier(column.is_not_null().to_numpy().astype(np.float64), f"count {name}")
            mean = pl.Series(
                np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
            )
            added[f"{PREFIX}mean_{name}"] = mean.fill_nan(None)
        rows = earlier(np.ones(len(ordered)), "rows")
        return added | {f"{PREFIX}count": pl.Series(rows).cast(pl.Int32)}

    def _add_totals(self, part: pl.DataFrame) -> None:
        sums = [pl.len().cast(pl.Float64).alias("rows")]
        for name in self.means:
            value = pl.col(name).cast(pl.Float64).fill_nan(None)
            sums += [value.sum().alias(f"sum {name}")]
            sums += [value.count().cast(pl.Float64).alias(f"count {name}")]
        totals = part.group_by(self.user).agg(sums)
        if self._totals is not None:
            totals = pl.concat([self._totals, totals]).group_by(self.user).sum()
        self._totals = totals.sort(self.user)


def add_history(
    log: pl.DataFrame,
    length: int,
    lists: Sequence[str] = ("video_id",),
    means: Sequence[str] = (),
    *,
    user: str = "user_id",
    time: str = "time_ms",
) -> pl.DataFrame:
    """Return a log with causal features of each user, see `UserHistory`.

    Raises:
        GatesError: A column is missing.
        ValueError: ``length`` is negative.
    """
    return UserHistory(length, lists, means, user=user, time=time).add(log)


def _segments(ordered: pl.DataFrame, user: str, time: str) -> tuple[Ints, Ints, Ints]:
    """Return of each row the first of its user, the first of its user and time, and the end."""
    rows = np.arange(len(ordered))
    if not len(rows):
        return rows, rows, rows
    new_user = (ordered[user] != ordered[user].shift(1)).fill_null(True).to_numpy()
    new_time = new_user | (ordered[time] != ordered[time].shift(1)).fill_null(True).to_numpy()
    firsts = np.flatnonzero(new_user)
    ends = np.append(firsts[1:], len(rows))
    number = np.cumsum(new_user) - 1
    tie = np.maximum.accumulate(np.where(new_time, rows, 0))
    return firsts[number], tie, ends[number]
