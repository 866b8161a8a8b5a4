"""Which frames an epoch draws: equally many of every object, or by weights that balance classes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Sampler

Rows = NDArray[np.int64]


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
        self.seed, self.num_replicas, self.rank = seed, num_replicas, rank
        self.epoch = 0

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
        even: See :class:`EpochSampler`.

    Raises:
        ValueError: n is not positive, or see :class:`EpochSampler`.
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
        if frames_per_object < 1:
            raise ValueError(f"frames_per_object must be at least 1, got {frames_per_object}")
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
        even: See :class:`EpochSampler`.

    Attributes:
        rows: (M,) the rows to draw from.
        probabilities: (M,) of each.

    Raises:
        ValueError: β is not in [0, 1), the balance is unknown, or see :class:`EpochSampler`.
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
