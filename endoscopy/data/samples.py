"""Samples of a frame table: which an epoch draws, in an order that a checkpoint restores."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.distributed import DistributedSampler

from core_gates.errors import GatesError, check_at_least
from endoscopy.data.frame_cache import FrameCache, FrameReader
from endoscopy.data.images import Frame, Pipeline
from endoscopy.data.streams import NEEDS_DEPTH, InputForm, network_input

LEAST_SHARE = 0.5
Batch = dict[str, Any]
Rows = NDArray[np.int64]


class Sample(NamedTuple):
    """A lesion on a frame.

    Attributes:
        frame: (S,S) frame with box, mask and depth, if there are any.
        size_mm: Diameter.
        censored: Whether the diameter is a lower bound.
        object: Position of the object in ``table.unique_ids``.
        row: Row of the frame table.
    """

    frame: Frame
    size_mm: float
    censored: bool
    object: int
    row: int


class LesionDataset(Dataset[Sample]):
    """Lesions of a frame table, by row.

    A sample depends on (seed, epoch, row) alone, whichever process requests it and whatever was
    requested before. Where the pipeline moves more than half of the box out of the frame, the frame
    is returned unchanged.

    Args:
        reader: Table and size.
        pipeline: Augmentation; none by default.
        cache: Tried before the reader.
        seed: Of the augmentation.
    """

    def __init__(
        self,
        reader: FrameReader,
        pipeline: Pipeline | None = None,
        cache: FrameCache | None = None,
        seed: int = 0,
    ) -> None:
        self.reader, self.pipeline, self.cache, self.seed = reader, pipeline, cache, seed
        self.sizes: NDArray[np.float64] = reader.table.frames["gt"].to_numpy(np.float64)

    def __len__(self) -> int:
        return len(self.reader.table)

    def __getitem__(self, row: int) -> Sample:
        return self.sample(row)

    def sample(self, row: int, epoch: int = 0) -> Sample:
        """Return a row as in epoch ``epoch``.

        Raises:
            GatesError: A file cannot be read.
        """
        reader = self.cache if self.cache and row in self.cache else self.reader
        frame = reader.read(row)
        if self.pipeline is not None:
            moved = self.pipeline(frame, self.seed, epoch, row)
            if _area(moved.box) >= LEAST_SHARE * _area(frame.box):
                frame = moved
        table = self.reader.table
        return Sample(
            frame,
            float(self.sizes[row]),
            bool(table.censored[row]),
            int(table.object_codes[row]),
            int(row),
        )


class BatchDataset(Dataset[Batch]):
    """Batches, by epoch and rows.

    Args:
        frames: Samples.
        form: Input of the network.
    """

    def __init__(self, frames: LesionDataset, form: InputForm) -> None:
        self.frames, self.form = frames, form

    def __getitem__(self, key: tuple[int, Iterable[int]]) -> Batch:
        epoch, rows = key
        return collate([self.frames.sample(row, epoch) for row in rows], self.form)


def collate(samples: Sequence[Sample], form: InputForm) -> Batch:
    """Make a batch of B samples.

    Returns:
        ``streams``: name to (B,C,H,W) float32, and ``geometry`` (B,4) float32, see
        `endoscopy.data.streams.network_input`; ``size_mm`` (B,) float32; ``censored`` (B,)
        bool; ``object`` and ``frame`` (B,) int64, the latter rows of the frame table.

    Raises:
        GatesError: A stream needs a depth that a sample lacks.
    """
    missing = [sample.row for sample in samples if sample.frame.depth is None]
    if missing and NEEDS_DEPTH & set(form.streams):
        raise GatesError(
            f"row {missing[0]} of the frame table has no depth, which the streams "
            f"{', '.join(form.streams)} need; leave them out"
        )
    streams, geometry = network_input([sample.frame for sample in samples], form)
    return {
        "streams": streams,
        "geometry": geometry,
        "size_mm": torch.tensor([sample.size_mm for sample in samples], dtype=torch.float32),
        "censored": torch.tensor([sample.censored for sample in samples]),
        "object": torch.tensor([sample.object for sample in samples]),
        "frame": torch.tensor([sample.row for sample in samples]),
    }


def _area(box: tuple[float, float, float, float]) -> float:
    xmin, ymin, xmax, ymax = box
    return (xmax - xmin) * (ymax - ymin)


class EpochSampler(Sampler[int]):
    """Draw an order of rows that depends on (seed, epoch) alone and share it among ranks.

    Rank r of R gets every R-th row from r on: shards are disjoint, together they are the whole
    order, and their lengths differ by at most one. A batch of B/R rows on each rank is a batch of B
    rows on one.

    Args:
        num_rows: Rows of an epoch over all ranks.
        seed: Of all epochs.
        num_replicas: Ranks.
        rank: This rank.
        even: Leave out the last rows of an epoch, fewer than there are ranks, so that all ranks
            take equally many steps.

    Raises:
        ValueError: The rank does not exist, or there is nothing to draw.
    """

    def __init__(
        self, num_rows: int, *, seed: int, num_replicas: int, rank: int, even: bool
    ) -> None:
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank must lie between 0 and {num_replicas - 1}, got {rank}")
        if num_rows < num_replicas:
            raise ValueError(f"{num_rows} rows cannot be shared by {num_replicas} ranks")
        self.num_rows = num_rows - (num_rows % num_replicas if even else 0)
        self.seed, self.num_replicas, self.rank, self.epoch = seed, num_replicas, rank, 0

    @abstractmethod
    def draw(self, epoch: int) -> Rows:
        """Return the rows of an epoch over all ranks, in order."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that is drawn next."""
        self.epoch = epoch

    def shard(self, epoch: int) -> Rows:
        """Return the rows of this rank in an epoch, in order."""
        return self.draw(epoch)[: self.num_rows][self.rank :: self.num_replicas]

    def drawable(self, epochs: int) -> Rows:
        """Return the rows that the first epochs draw on any rank, ascending, for a cache."""
        return np.unique(np.concatenate([self.draw(epoch) for epoch in range(epochs)]))

    def generator(self, epoch: int) -> np.random.Generator:
        """Return the random numbers of an epoch."""
        return np.random.default_rng((self.seed, epoch))

    def __iter__(self) -> Iterator[int]:
        return iter(self.shard(self.epoch).tolist())

    def __len__(self) -> int:
        return -(-(self.num_rows - self.rank) // self.num_replicas)


class ObjectBalancedSampler(EpochSampler):
    """Draw ``min(n, n_obj)`` distinct frames of every object, and shuffle.

    Objects with one frame are kept. Giving classes instead of objects draws equally many of each
    class.

    Args:
        objects: (N,) object of every row, any values that can be sorted.
        frames_per_object: n.
        rows: Rows to draw from, positions in ``objects``; all by default.
        seed: Of all epochs.
        frozen: Take the first n frames of every object in the order of the rows, objects in the
            order of their first row, in every epoch, unshuffled; for validation and test.
        num_replicas: Ranks.
        rank: This rank.
        even: See `EpochSampler`.

    Raises:
        ValueError: n is not positive, or see `EpochSampler`.
    """

    def __init__(
        self,
        objects: ArrayLike,
        frames_per_object: int = 40,
        *,
        rows: Sequence[int] | Rows | None = None,
        seed: int = 0,
        frozen: bool = False,
        num_replicas: int = 1,
        rank: int = 0,
        even: bool = False,
    ) -> None:
        check_at_least(1, frames_per_object=frames_per_object)
        codes = np.asarray(objects)
        chosen = np.arange(len(codes)) if rows is None else np.asarray(rows, dtype=np.int64)
        self.groups = group_rows(codes, chosen)
        self.frames_per_object, self.frozen = frames_per_object, frozen
        total = sum(min(frames_per_object, len(group)) for group in self.groups)
        super().__init__(total, seed=seed, num_replicas=num_replicas, rank=rank, even=even)

    def draw(self, epoch: int) -> Rows:
        """Return the rows of an epoch over all ranks, in order."""
        n = self.frames_per_object
        if self.frozen:
            return np.concatenate([group[:n] for group in self.groups])
        generator = self.generator(epoch)
        drawn = [
            generator.choice(group, min(n, len(group)), replace=False) for group in self.groups
        ]
        return generator.permutation(np.concatenate(drawn))


class WeightedFrameSampler(EpochSampler):
    """Draw frames with replacement, by weights that depend on class and object.

    Frame weights are w_c / n_frames(object), so that the frames of an object share its weight:

    - ``class``: w_c = 1 / (classes * objects in c), all classes equally often;
    - ``effective``: w_c = (1 - β) / (1 - β^objects in c), between all objects (β = 0) and all
      classes equally often (β → 1) (Cui et al. 2019, eq. 2, with objects as samples).

    Args:
        objects: (N,) object of every row.
        classes: (N,) class of every row, one for each object.
        num_samples: Rows of an epoch over all ranks.
        balance: ``class`` or ``effective``.
        beta: β.
        rows: Rows to draw from; all by default.
        seed: Of all epochs.
        num_replicas: Ranks.
        rank: This rank.
        even: See `EpochSampler`.

    Attributes:
        rows: (M,) the rows to draw from.
        probabilities: (M,) of each.

    Raises:
        ValueError: β is not in [0, 1), the balance is unknown, or see `EpochSampler`.
    """

    def __init__(
        self,
        objects: ArrayLike,
        classes: ArrayLike,
        num_samples: int,
        *,
        balance: str = "class",
        beta: float = 0.99,
        rows: Sequence[int] | Rows | None = None,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
        even: bool = False,
    ) -> None:
        if balance not in ("class", "effective"):
            raise ValueError(f"balance must be class or effective, got {balance!r}")
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"beta must be at least 0 and below 1, got {beta}")
        codes, labels = np.asarray(objects), np.asarray(classes)
        self.rows = np.arange(len(codes)) if rows is None else np.asarray(rows, dtype=np.int64)
        super().__init__(num_samples, seed=seed, num_replicas=num_replicas, rank=rank, even=even)
        groups = group_rows(codes, self.rows)
        kinds, kind_of = np.unique([labels[group[0]] for group in groups], return_inverse=True)
        count = np.bincount(kind_of).astype(np.float64)
        weight = 1.0 / (len(kinds) * count)
        if balance == "effective":
            weight = (1.0 - beta) / (1.0 - beta**count)
        weights = np.zeros(len(codes))
        for group, kind in zip(groups, kind_of, strict=True):
            weights[group] = weight[kind] / len(group)
        self.probabilities = weights[self.rows] / weights[self.rows].sum()

    def draw(self, epoch: int) -> Rows:
        """Return the rows of an epoch over all ranks, in order."""
        return self.generator(epoch).choice(self.rows, self.num_rows, p=self.probabilities)


def group_rows(objects: NDArray[np.generic], rows: Rows) -> list[Rows]:
    """Return the rows of each object, objects in the order of their first row.

    Raises:
        ValueError: There are no rows.
    """
    if len(rows) == 0:
        raise ValueError("there are no rows to draw from")
    _, first, inverse = np.unique(objects[rows], return_index=True, return_inverse=True)
    by_object = np.split(rows[np.argsort(inverse, kind="stable")], np.cumsum(np.bincount(inverse)))
    return [by_object[position] for position in np.argsort(first)]


class BatchOrder(DistributedSampler[tuple[int, list[int]]]):
    """Cut the rows of a rank into batches, each with its epoch.

    It is a DistributedSampler, since it distributes rows over ranks, so that Lightning does not
    insert its own.

    Args:
        sampler: Rows of an epoch.
        batch_size: Rows of a batch on this rank.
        even: Make all batches nearly equally long, and equally many on every rank; otherwise all
            but the last have ``batch_size`` rows.

    Attributes:
        start: Batch that the next pass begins with, set by a resume; later passes begin at 0.
    """

    def __init__(self, sampler: EpochSampler, batch_size: int, *, even: bool = False) -> None:
        check_at_least(1, batch_size=batch_size)
        self.rows, self.batch_size, self.even, self.start = sampler, batch_size, even, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        self.rows.set_epoch(epoch)

    def __len__(self) -> int:
        longest = -(-self.rows.num_rows // self.rows.num_replicas)
        return -(-longest // self.batch_size)

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        epoch, number = self.rows.epoch, len(self)
        rows = self.rows.shard(epoch)
        ends = np.arange(1, number) * self.batch_size
        batches = np.array_split(rows, number) if self.even else np.split(rows, ends)
        first, self.start = self.start, 0
        for batch in batches[first:]:
            yield epoch, batch.tolist()


class FrameLoader(DataLoader[Batch]):
    """Load batches in order, with any number of worker processes; make one with `over`.

    Attributes:
        position: The next batch of the current pass, or of the last one.
    """

    position = 0

    @classmethod
    def over(cls, batches: BatchDataset, order: BatchOrder, num_workers: int = 0) -> FrameLoader:
        """Return a loader of the batches in that order.

        It draws no random number from the global generator, so that a resumed run draws as many.
        """
        return cls(
            batches,
            batch_size=None,
            sampler=order,  # type: ignore[arg-type]
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        assert isinstance(self.sampler, BatchOrder)
        self.position = self.sampler.start
        for batch in super().__iter__():
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the batch that comes next."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the batch of ``state``, without reading those before it."""
        assert isinstance(self.sampler, BatchOrder)
        self.position = self.sampler.start = state["position"] % len(self)
