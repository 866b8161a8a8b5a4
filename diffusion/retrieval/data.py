"""Batches of adapters with a random caption each."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from core_gates.collectives import num_ranks, rank_in
from core_gates.errors import check_at_least
from diffusion.lora_file.errors import LoraFileError
from diffusion.retrieval.batch import AdapterBatch, collate
from diffusion.retrieval.captions import Captions, Example, TextEncoder
from diffusion.retrieval.config import EncoderConfig
from diffusion.retrieval.modules import modules_of
from diffusion.retrieval.refusal import refusal_of


class Pairs(NamedTuple):
    """Adapters with captions.

    Attributes:
        adapters: n adapters.
        text: Caption embeddings (Q, text_dim).
        numbers: (n,) number of each adapter among those of training.
        concepts: (n,) number of its concept.
        owners: (Q,) which of the n adapters each caption is of; in training the i-th of the i-th.
    """

    adapters: AdapterBatch
    text: Tensor
    numbers: Tensor
    concepts: Tensor
    owners: Tensor


class Adapters(Dataset[Pairs]):
    """Adapters that are asked for in whole batches.

    Args:
        examples: Adapters with captions.
        config: Of the encoder, which decides what is read.
        encoder: Embeds the captions.
        in_memory: Whether all factors are kept in memory, padded to one rank.

    Raises:
        LoraFileError: There is no adapter, one does not fit the encoder, or lacks a caption.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        config: EncoderConfig,
        encoder: TextEncoder,
        *,
        in_memory: bool = True,
    ) -> None:
        if not examples:
            raise LoraFileError("there is no adapter to train from: give at least two")
        self.examples, self.modules = list(examples), modules_of(config.shape, config.types)
        for number, example in enumerate(examples):
            _check(example, config, f"adapter {number + 1}")
        self.captions = Captions(examples, encoder)
        concepts = list(dict.fromkeys(example.concept for example in examples))
        self.concepts = torch.tensor([concepts.index(example.concept) for example in examples])
        self._kept = self._collated(range(len(examples))) if in_memory else None

    def __len__(self) -> int:
        """Return the number of adapters."""
        return len(self.examples)

    def __getitem__(self, numbers: list[int]) -> Pairs:
        """Return the part of a batch that belongs to this rank, with a random caption each.

        Captions of the whole batch are drawn, so that several ranks see those that one would.
        """
        whole = torch.tensor(numbers)
        size = len(whole) // num_ranks()
        part = slice(rank_in() * size, (rank_in() + 1) * size)
        index, text = whole[part], self.captions.draw(whole)[part]
        own = torch.arange(len(index))
        return Pairs(self.batch(index), text, index, self.concepts[index], own)

    def batch(self, index: Tensor) -> AdapterBatch:
        """Return some adapters."""
        return self._collated(index.tolist()) if self._kept is None else self._kept.rows(index)

    def part(self, numbers: Sequence[int]) -> Pairs:
        """Return some adapters with all of their captions."""
        index = torch.tensor(list(numbers))
        text, owners = self.captions.all()
        places = {number: place for place, number in enumerate(numbers)}
        wanted = torch.isin(owners, index)
        own = torch.tensor([places[int(owner)] for owner in owners[wanted]], dtype=torch.int64)
        return Pairs(self.batch(index), text[wanted], index, self.concepts[index], own)

    def _collated(self, numbers: Sequence[int]) -> AdapterBatch:
        batch = collate([self.examples[number].bundle for number in numbers], self.modules)
        if not batch.present.any(1).all():
            number = numbers[int(batch.present.any(1).int().argmin())]
            raise LoraFileError(
                f"adapter {number + 1} ({self.examples[number].concept}): all of its changes that "
                "the encoder reads are zero; leave it out"
            )
        return batch


class _Parts(Dataset[Pairs]):
    """All adapters with all of their captions, so many at a time."""

    def __init__(self, adapters: Adapters, size: int) -> None:
        self.adapters = adapters
        self.starts = range(0, len(adapters), size)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> Pairs:
        start = self.starts[number]
        return self.adapters.part(range(start, min(start + self.starts.step, len(self.adapters))))


class Rounds:
    """Batches of numbers: each round goes through all adapters in random order.

    Several ranks draw the same order; a batch is that of all of them together.

    Args:
        count: Number of adapters.
        size: Adapters of a batch on each rank; all of them, spread over the ranks, if None.
        steps: Batches of an epoch.
    """

    def __init__(self, count: int, size: int | None, steps: int) -> None:
        self.count, self.size, self.steps = count, size, steps

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        """Draw the batches of an epoch.

        Only its seed comes from the global random number generator, so that a resumed run, which
        skips batches without training on them, gets the same ones.
        """
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        ranks = num_ranks()
        own = max(1, self.count // ranks) if self.size is None else self.size
        waiting: list[int] = []
        for _ in range(self.steps):
            while len(waiting) < own * ranks:
                waiting += torch.randperm(self.count, generator=generator).tolist()
            batch, waiting = waiting[: own * ranks], waiting[own * ranks :]
            yield batch


class RetrieverData(L.LightningDataModule):
    """Adapters for training and, if given, others for validation.

    Trainers on several ranks need ``use_distributed_sampler=False``, since batches know their rank.

    Args:
        training: Adapters with captions, see :func:`diffusion.retrieval.table.split_table`.
        config: Of the encoder.
        text_encoder: Embeds every different caption once.
        validation: Adapters that are searched by their captions after an epoch.
        batch_size: Adapters of a batch on each rank; all of them, spread over ranks, if None.
        steps_per_epoch: Batches of an epoch.
        in_memory: Whether all factors are kept in memory. Files of large models are rather read at
            every step.

    Raises:
        ValueError: A number is not positive.
        LoraFileError: See :class:`Adapters`.
    """

    def __init__(
        self,
        training: Sequence[Example],
        config: EncoderConfig,
        text_encoder: TextEncoder,
        *,
        validation: Sequence[Example] = (),
        batch_size: int | None = None,
        steps_per_epoch: int = 50,
        in_memory: bool = True,
    ) -> None:
        super().__init__()
        check_at_least(1, batch_size=batch_size, steps_per_epoch=steps_per_epoch)
        self.config, self.batch_size, self.steps = config, batch_size, steps_per_epoch
        self.in_memory, self.text_fingerprint = in_memory, text_encoder.fingerprint
        self.training = Adapters(training, config, text_encoder, in_memory=in_memory)
        found = self.training.captions.embeddings.shape[1]
        if found != config.out_dim:
            raise LoraFileError(
                f"the text encoder has {found} features and the encoder {config.out_dim}: set "
                f"text_dim to {found}"
            )
        self.validation = (
            Adapters(validation, config, text_encoder, in_memory=in_memory) if validation else None
        )

    def setup(self, stage: str) -> None:
        """Switch validation off where there is nothing to validate with."""
        if stage == "fit" and self.validation is None and self.trainer is not None:
            self.trainer.limit_val_batches = 0

    def train_dataloader(self) -> DataLoader[Pairs]:
        """Return batches without end in sight, ``steps_per_epoch`` an epoch."""
        rounds = Rounds(len(self.training), self.batch_size, self.steps)
        return DataLoader(self.training, sampler=rounds, batch_size=None)

    def val_dataloader(self) -> DataLoader[Pairs]:
        """Return all adapters of validation, at once or as many as in a step of training."""
        assert self.validation is not None
        size = len(self.validation) if self.in_memory else self.batch_size or 1
        return DataLoader(_Parts(self.validation, size), batch_size=None)


def _check(example: Example, config: EncoderConfig, label: str) -> None:
    """Refuse an adapter that the encoder cannot read.

    Raises:
        LoraFileError: It does not fit.
    """
    reason = refusal_of(example.bundle, config)
    if reason:
        raise LoraFileError(f"{label} ({example.concept}): {reason}")
