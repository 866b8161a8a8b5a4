"""Labeled sequences of unequal lengths, in batches whose order depends on seed and epoch alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core_gates.errors import GatesError, check_at_least
from harness.files import Data, short_digest

Split = Literal["train", "validation", "test"]
SPLITS = get_args(Split)
Augment = Callable[[NDArray[np.float32], np.random.Generator], NDArray[np.float32]]


class SequenceBatch(NamedTuple):
    """A batch.

    Attributes:
        x: Symbols (B, T), int64, or samples (B, T), float32; zeros after the end of a sequence.
        padding_mask: True (B, T) after the end.
        labels: Classes (B,), int64.
    """

    x: Tensor
    padding_mask: Tensor
    labels: Tensor


class Part(NamedTuple):
    """The sequences of a split.

    Attributes:
        inputs: Each (T,), integer symbols or float32 samples.
        labels: Their classes (N,), int64.
        names: Their names.
    """

    inputs: Sequence[NDArray[Any]]
    labels: NDArray[np.int64]
    names: Sequence[str]


class SequenceLoader:
    """Batches of a part in its order, those of one rank.

    Args:
        part: The sequences.
        batch_size: Sequences of a step over all ranks.
        rank: This rank.
        world: Ranks.

    Raises:
        GatesError: Ranks would have unequal batches.
    """

    def __init__(self, part: Part, batch_size: int, *, rank: int = 0, world: int = 1) -> None:
        if batch_size % world:
            raise GatesError(
                f"batch_size {batch_size} cannot be split evenly by {world} processes: choose a "
                f"multiple of {world}"
            )
        self.part, self.batch_size, self.rank, self.world = part, batch_size, rank, world

    def __len__(self) -> int:
        """Return the number of batches of a pass."""
        return -(-len(self.part.inputs) // self.batch_size)

    def __iter__(self) -> Iterator[SequenceBatch]:
        """Yield the batches of this rank."""
        for number in range(len(self)):
            indices = self._indices(np.arange(len(self.part.inputs)), number)
            yield batch_of([self.part.inputs[i] for i in indices], self.part.labels[indices])

    def _indices(self, order: NDArray[np.int64], number: int) -> NDArray[np.int64]:
        first = number * self.batch_size
        return order[first : first + self.batch_size][self.rank :: self.world]


class TrainingLoader(SequenceLoader):
    """Batches in an order of the epoch; sequences that fill no batch are left out of it.

    Args:
        part: The sequences.
        batch_size: Sequences of a step over all ranks.
        seed: Of order and changes.
        augment: Changes a sequence, by random numbers of the seed, the epoch and the sequence
            alone; nothing if None.
        rank: This rank.
        world: Ranks.

    Attributes:
        position: Batch that comes next in the pass that runs, or ran last.

    Raises:
        GatesError: Ranks would have unequal batches, or there is no whole batch.
    """

    def __init__(
        self,
        part: Part,
        batch_size: int,
        *,
        seed: int = 0,
        augment: Augment | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        super().__init__(part, batch_size, rank=rank, world=world)
        if len(part.inputs) < batch_size:
            raise GatesError(
                f"{len(part.inputs)} training sequences fill no batch of {batch_size}: lower "
                "the batch_size of the data, or give more sequences"
            )
        self.seed, self.augment = seed, augment
        self.epoch = self.position = self._start = 0

    def __len__(self) -> int:
        """Return the number of whole batches."""
        return len(self.part.inputs) // self.batch_size

    @property
    def sampler(self) -> TrainingLoader:
        """The object that Lightning tells the epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[SequenceBatch]:
        """Yield the batches of this rank."""
        generator = np.random.default_rng((self.seed, self.epoch))
        order = generator.permutation(len(self.part.inputs))
        self.position, self._start = self._start, 0
        for number in range(self.position, len(self)):
            self.position = number + 1
            indices = self._indices(order, number)
            inputs = [self._changed(int(index)) for index in indices]
            yield batch_of(inputs, self.part.labels[indices])

    def _changed(self, index: int) -> NDArray[Any]:
        x = self.part.inputs[index]
        if self.augment is None:
            return x
        return self.augment(x, np.random.default_rng((self.seed, self.epoch, index)))

    def state_dict(self) -> dict[str, int]:
        """Return the batch that comes next, and its epoch."""
        return {"position": self.position, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at the batch of ``state``, without making those before it."""
        self.epoch = state["epoch"]
        self.position = self._start = state["position"] % len(self)


def batch_of(inputs: Sequence[NDArray[Any]], labels: NDArray[np.int64]) -> SequenceBatch:
    """Return sequences as one batch, zeros after their ends."""
    lengths = np.array([len(x) for x in inputs], dtype=np.int64)
    longest = max(1, int(lengths.max(initial=0)))
    dtype = torch.int64 if inputs and inputs[0].dtype.kind == "i" else torch.float32
    x = torch.zeros(len(inputs), longest, dtype=dtype)  # aligned, unlike an array of numpy
    for row, values in zip(x.numpy(), inputs, strict=True):
        row[: len(values)] = values
    ended = torch.arange(longest) >= torch.from_numpy(lengths).unsqueeze(1)
    return SequenceBatch(x, ended, torch.tensor(labels))


class SequenceData(L.LightningDataModule):
    """Labeled sequences in three parts; a subclass reads them.

    Args:
        batch_size: Sequences of a step over all ranks.
        seed: Of the order, and of random changes in training.

    Attributes:
        classes: Name of each class.
        symbols: Number of symbols, padding among them; 0 of samples.
        augment: Changes a sequence in training; None for nothing.

    Raises:
        ValueError: The size is below 1, or the seed is negative.
    """

    classes: Sequence[str] = ()
    needs = "give more files"  # a part without sequences
    symbols = 0
    augment: Augment | None = None

    def __init__(self, batch_size: int, seed: int) -> None:
        super().__init__()
        check_at_least(1, batch_size=batch_size)
        check_at_least(0, seed=seed)
        self.batch_size, self.seed = batch_size, seed
        self._parts: Mapping[Split, Part] = {}

    def read(self) -> Mapping[Split, Part]:
        """Return the sequences of every split, and set `classes` and `symbols`.

        Raises:
            GatesError: They cannot be read.
        """
        raise NotImplementedError

    def part(self, split: Split) -> Part:
        """Return the sequences of a split, which are read once.

        Raises:
            GatesError: They cannot be read.
        """
        if not self._parts:
            self._parts = self.read()
        return self._parts[split]

    def setup(self, stage: str) -> None:
        """Read the sequences.

        Raises:
            GatesError: A part is empty, that for tests in stage ``test`` alone; a class is alone;
                or, in stage ``test``, a sequence that tests also trains.
        """
        self.part("train")
        if len(self.classes) == 1:
            raise GatesError(
                f"the data have the class {self.classes[0]!r} alone: give sequences of another, too"
            )
        for split in SPLITS if stage == "test" else SPLITS[:2]:
            if not len(self.part(split).inputs):
                raise GatesError(f"the {split} part has no sequence: {self.needs}")
        if stage == "test":
            trained = dict(zip(self._objects("train"), self.part("train").names, strict=True))
            for one, name in zip(self._objects("test"), self.part("test").names, strict=True):
                if one in trained:
                    raise GatesError(
                        f"{name}, which tests, equals {trained[one]}, which trains: leave one out"
                    )

    def digest(self) -> list[Data]:
        """Describe each part by its content."""
        return [
            Data(
                type(self).__name__,
                split,
                short_digest(self._objects(split)),
                len(part.inputs),
                "sequences",
            )
            for split in SPLITS
            for part in [self.part(split)]
        ]

    def _objects(self, split: Split) -> list[str]:
        part = self.part(split)
        names = [int(name) if name.isdecimal() else name for name in self.classes]
        return [
            short_digest([x.tobytes().hex(), names[label]])
            for x, label in zip(part.inputs, part.labels, strict=True)
        ]

    def training_objects(self) -> list[str]:
        """Return a short hash of every training sequence."""
        return sorted(set(self._objects("train")))

    def test_objects(self) -> list[str]:
        """Return a short hash of every test sequence."""
        return sorted(set(self._objects("test")))

    def train_dataloader(self) -> TrainingLoader:
        """Return the training batches of this rank."""
        rank, world = self._rank()
        return TrainingLoader(
            self.part("train"), self.batch_size, seed=self.seed, augment=self.augment,
            rank=rank, world=world,
        )  # fmt: skip

    def val_dataloader(self) -> SequenceLoader:
        """Return the validation batches of this rank."""
        rank, world = self._rank()
        return SequenceLoader(self.part("validation"), self.batch_size, rank=rank, world=world)

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
