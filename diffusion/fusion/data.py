"""Tasks of a fusion, and the batches that gates are trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import lightning as L
import torch
from torch import Tensor

from core_gates.errors import GatesError
from diffusion.models.flow_matching import Noised, noised
from diffusion.models.text import TextStates


@dataclass(frozen=True)
class FusionTask:
    """Images that several adapters together should make.

    Attributes:
        adapters: Names of the adapters, in order.
        latents: (N, C, h, w) of the images.
        text: Of their captions.
        wrong: Of captions (M) that do not describe the images, such as those of one adapter alone;
            None if there are none.
    """

    adapters: tuple[str, ...]
    latents: Tensor
    text: TextStates
    wrong: TextStates | None = None

    def __post_init__(self) -> None:
        """Check the sizes.

        Raises:
            GatesError: There is no image, or a number of captions differs from theirs.
        """
        count, captions = len(self.latents), len(self.text.pooled)
        if not count or count != captions:
            name = " + ".join(self.adapters)
            raise GatesError(
                f"task {name} has {count} latents and {captions} captions: give one each"
            )


class FusionBatch(NamedTuple):
    """What one step of the training of gates sees: a task, and some of its latents with noise.

    Attributes:
        adapters: Names of the adapters to attach.
        at: Noised latents (B, C, h, w).
        text: Of their captions, some of them empty.
        wrong_at: The same latents at other times with other noise; None without wrong captions.
        wrong_text: Of captions that do not describe them.
    """

    adapters: tuple[str, ...]
    at: Noised
    text: TextStates
    wrong_at: Noised | None = None
    wrong_text: TextStates | None = None


class FusionDraws:
    """The batches of a training, each a function of the seed and its number alone.

    Several processes share each batch: all have its task, and each an equal part of its latents,
    with the noise that one process alone would draw for them.

    Args:
        tasks: Each comes once in every round, in a new order.
        empty: States of the empty caption, of batch size 1.
        steps: Number of batches.
        batch_size: Latents of a batch over all processes; drawn again where a task has fewer.
        caption_dropout: Fraction of captions that are left empty.
        seed: Of all that is drawn.
        rank: Number of this process.
        world_size: Number of processes.

    Raises:
        GatesError: There is no task, or processes would have unlike parts.
    """

    def __init__(
        self,
        tasks: Sequence[FusionTask],
        empty: TextStates,
        *,
        steps: int,
        batch_size: int = 32,
        caption_dropout: float = 0.3,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not tasks:
            raise GatesError("gates need at least one task to be trained on, found none")
        if batch_size < 1 or batch_size % world_size:
            raise GatesError(
                f"a batch of {batch_size} cannot be shared equally by {world_size} processes:"
                f" choose a multiple of {world_size}"
            )
        self.tasks, self.empty, self.steps = tuple(tasks), empty, steps
        self.batch_size, self.caption_dropout, self.seed = batch_size, caption_dropout, seed
        share = batch_size // world_size
        self._own = slice(rank * share, (rank + 1) * share)

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[FusionBatch]:
        for step in range(self.steps):
            yield self[step]

    def task_of(self, step: int) -> FusionTask:
        """Return the task of a step."""
        number, place = divmod(step, len(self.tasks))
        order = torch.randperm(len(self.tasks), generator=self._generator(number, 0))
        return self.tasks[int(order[place])]

    def __getitem__(self, step: int) -> FusionBatch:
        """Return the part of a batch that belongs to this process."""
        task, draw, count = self.task_of(step), self._generator(step, 1), self.batch_size
        rows = _rows(len(task.latents), count, draw)
        dropped = torch.rand(count, generator=draw) < self.caption_dropout
        right = self._at(task.latents[rows], draw)
        text = self._dropped(task.text.of(rows[self._own]), dropped[self._own])
        if task.wrong is None:
            return FusionBatch(task.adapters, right, text)
        wrong = self._at(task.latents[rows], draw)
        captions = torch.randint(len(task.wrong.pooled), (count,), generator=draw)
        return FusionBatch(task.adapters, right, text, wrong, task.wrong.of(captions[self._own]))

    def _at(self, latents: Tensor, draw: torch.Generator) -> Noised:
        t = torch.randn(len(latents), generator=draw).sigmoid().to(latents)
        noise = torch.randn(latents.shape, generator=draw).to(latents)
        return noised(latents[self._own], t[self._own], noise[self._own])

    def _dropped(self, text: TextStates, dropped: Tensor) -> TextStates:
        return TextStates(
            torch.where(dropped.view(-1, 1, 1), self.empty.tokens.to(text.tokens), text.tokens),
            torch.where(dropped.view(-1, 1), self.empty.pooled.to(text.pooled), text.pooled),
        )

    def _generator(self, number: int, what: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 2 + what) * 1_000_000_007 + number)


class PairDataModule(L.LightningDataModule):
    """One task a step, drawn shuffled, for :class:`diffusion.fusion.module.FusionModule`.

    One epoch is the whole training.

    Args:
        tasks: Each comes once in every round, in a new order.
        empty: States of the empty caption, of batch size 1.
        steps: Steps of the training.
        batch_size: Latents of a step over all processes; drawn again where a task has fewer.
        caption_dropout: Fraction of captions that are left empty.
        seed: Of tasks, latents, times and noise.
    """

    def __init__(
        self,
        tasks: Sequence[FusionTask],
        empty: TextStates,
        *,
        steps: int,
        batch_size: int = 32,
        caption_dropout: float = 0.3,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.tasks, self.empty, self.steps = tuple(tasks), empty, steps
        self.batch_size, self.caption_dropout, self.seed = batch_size, caption_dropout, seed

    def train_dataloader(self) -> FusionDraws:
        """Return the batches of this process."""
        trainer = self.trainer
        return FusionDraws(
            self.tasks,
            self.empty,
            steps=self.steps,
            batch_size=self.batch_size,
            caption_dropout=self.caption_dropout,
            seed=self.seed,
            rank=0 if trainer is None else trainer.global_rank,
            world_size=1 if trainer is None else trainer.world_size,
        )


def _rows(available: int, count: int, draw: torch.Generator) -> Tensor:
    """Return rows (count,) without repeating one before all have been drawn."""
    rounds = -(-count // available)
    found = [torch.randperm(available, generator=draw) for _ in range(rounds)]
    return torch.cat(found)[:count]
