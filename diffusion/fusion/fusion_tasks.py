"""Tasks of a fusion, from pairs or a table, and the batches that gates are trained on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import lightning as L
import torch
from torch import Tensor

from core_gates.errors import GatesError
from diffusion.data.published_table import inside, read_rows
from diffusion.fusion.retrieved import Retrieved
from diffusion.lora_file.container import label
from diffusion.models.flow_matching import Noised, noised, shifted
from diffusion.models.pipelines import Codec, latents_of
from diffusion.models.text_encoders import TextStates


@dataclass(frozen=True)
class FusionTask:
    """Images that several adapters together should make.

    Attributes:
        adapters: Names of the adapters, in order.
        latents: (N, C, h, w) of the images.
        text: Of their captions.
        wrong: Of captions (M) that do not describe the images, such as those of one adapter alone;
            None if there are none.
        scores: How well each adapter suits each caption (N, K); None if that is not known. One
            that the images do not show teaches the switch to turn it off.
        found: What a search for the captions knows of the adapters; None if there was none.
    """

    adapters: tuple[str, ...]
    latents: Tensor
    text: TextStates
    wrong: TextStates | None = None
    scores: Tensor | None = None
    found: Retrieved | None = None

    def __post_init__(self) -> None:
        """Check the sizes.

        Raises:
            GatesError: There is no image, or a number of captions or scores differs.
        """
        if self.scores is not None and self.scores.shape != (len(self.latents), len(self.adapters)):
            raise GatesError(
                f"task {' + '.join(self.adapters)} has scores {tuple(self.scores.shape)}, expected"
                f" {(len(self.latents), len(self.adapters))}: one for each caption and adapter"
            )
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
        roles_known: Whether the roles of adapters are known.
        scores: Name -> how well the adapter suits one of the captions; None if that is not known.
        found: What a search for the captions knows of the adapters; None if there was none.
    """

    adapters: tuple[str, ...]
    at: Noised
    text: TextStates
    wrong_at: Noised | None = None
    wrong_text: TextStates | None = None
    roles_known: bool = True
    scores: dict[str, float] | None = None
    found: Retrieved | None = None


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
        told: Fraction of steps in which the roles of adapters are known.
        shift: Of the times, see `diffusion.models.flow_matching.shifted`.
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
        told: float = 1.0,
        shift: float = 1.0,
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
        self.told, self.shift = told, shift
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
        rounds = range(-(-count // len(task.latents)))  # all are drawn before one comes again
        rows = torch.cat([torch.randperm(len(task.latents), generator=draw) for _ in rounds])[
            :count
        ]
        dropped = torch.rand(count, generator=draw) < self.caption_dropout
        right = self._at(task.latents[rows], draw)
        text = task.text.of(rows[self._own]).where(dropped[self._own], self.empty)
        batch = FusionBatch(task.adapters, right, text)
        if task.wrong is not None:
            wrong = self._at(task.latents[rows], draw)
            captions = torch.randint(len(task.wrong.pooled), (count,), generator=draw)
            batch = batch._replace(wrong_at=wrong, wrong_text=task.wrong.of(captions[self._own]))
        if task.scores is not None:
            scores = dict(zip(task.adapters, task.scores[rows[0]].tolist(), strict=True))
            batch = batch._replace(scores=scores)
        if task.found is not None:
            batch = batch._replace(found=task.found.of(rows[self._own]))
        return batch._replace(roles_known=bool(torch.rand((), generator=draw) < self.told))

    def _at(self, latents: Tensor, draw: torch.Generator) -> Noised:
        t = shifted(torch.randn(len(latents), generator=draw).sigmoid().to(latents), self.shift)
        noise = torch.randn(latents.shape, generator=draw).to(latents)
        return noised(latents[self._own], t[self._own], noise[self._own])

    def _generator(self, number: int, what: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 2 + what) * 1_000_000_007 + number)


class PairDataModule(L.LightningDataModule):
    """One task a step, drawn shuffled, for `diffusion.fusion.fusion_module.FusionModule`.

    One epoch is the whole training.

    Args:
        tasks: Each comes once in every round, in a new order.
        empty: States of the empty caption, of batch size 1.
        steps: Steps of the training.
        batch_size: Latents of a step over all processes; drawn again where a task has fewer.
        caption_dropout: Fraction of captions that are left empty.
        told: Fraction of steps in which the roles of adapters are known.
        shift: Of the times, see `diffusion.models.flow_matching.shifted`.
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
        told: float = 1.0,
        shift: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.tasks, self.empty, self.steps, self.told = tuple(tasks), empty, steps, told
        self.batch_size, self.caption_dropout, self.seed = batch_size, caption_dropout, seed
        self.shift = shift

    def train_dataloader(self) -> FusionDraws:
        """Return the batches of this process."""
        trainer = self.trainer
        return FusionDraws(
            self.tasks,
            self.empty,
            steps=self.steps,
            batch_size=self.batch_size,
            caption_dropout=self.caption_dropout,
            told=self.told,
            shift=self.shift,
            seed=self.seed,
            rank=0 if trainer is None else trainer.global_rank,
            world_size=1 if trainer is None else trainer.world_size,
        )


SEPARATOR = ";"  # between the files of adapters that made an image together


class TargetImages(NamedTuple):
    """Images that one set of adapters should make.

    Attributes:
        adapters: Their names, which are those of their files in the table.
        images: Their files.
        captions: The longest of each image.
    """

    adapters: tuple[str, ...]
    images: list[Path]
    captions: list[str]


def read_target_images(path: Path) -> list[TargetImages]:
    """Read a table whose ``model_file`` names one adapter, or several as ``a;b``.

    Args:
        path: See `diffusion.data.published_table.read_rows`.

    Raises:
        LoraFileError: See `diffusion.data.published_table.read_rows`.
        GatesError: A row has no image, or there are too few adapters to be used together.
    """
    by_names: dict[tuple[str, ...], TargetImages] = {}
    for row in read_rows(path):
        names = tuple(name.strip() for name in row.model_file.split(SEPARATOR) if name.strip())
        if not names or len({inside(path.parent, name) for name in names}) < len(names):
            what = "names an adapter twice: give each once" if names else "names no adapter"
            raise GatesError(f"line {row.line} of {label(path)} {what}")
        image = inside(path.parent, row.image_file) if row.image_file else None
        if image is None or not image.is_file():
            what = "has no image_file: fill it in"
            if image is not None:
                what = f"names {row.image_file}, which is missing"
            raise GatesError(f"line {row.line} of {label(path)} {what}")
        entry = by_names.setdefault(names, TargetImages(names, [], []))
        entry.images.append(image)
        entry.captions.append(row.forms[0] if row.forms else next(iter(row.captions)))
    alone = [names for names in by_names if len(names) == 1]
    if len(alone) == 1:
        raise GatesError(
            f"{label(path)} has images of {'one adapter' if len(by_names) == 1 else alone[0][0]}"
            " alone: gates weigh several, so give rows of two such adapters, or none"
        )
    return list(by_names.values())


def tasks_of(
    shown: Sequence[TargetImages],
    codec: Codec,
    *,
    partners: int = 8,
    contrast: bool = False,
    seed: int = 0,
) -> list[FusionTask]:
    """Return the tasks that gates are trained on.

    Images of several adapters are a task of these. Those of one adapter are tasks of it together
    with each of its partners, whose captions are the wrong ones (AutoLoRA, 2025).

    Args:
        shown: See `read_target_images`.
        codec: Of the model.
        partners: Other adapters that each one alone is combined with.
        contrast: Whether tasks need wrong captions.
        seed: Of the partners.
    """
    text = {entry.adapters: codec.states(entry.captions) for entry in shown}
    latents = {entry.adapters: latents_of(codec, entry.images) for entry in shown}
    alone = [entry.adapters for entry in shown if len(entry.adapters) == 1]
    draw, tasks = torch.Generator().manual_seed(seed), []
    for names in text:
        if len(names) > 1:
            wrong = _others(names, text) if contrast else None
            tasks.append(FusionTask(names, latents[names], text[names], wrong))
            continue
        others = [other for other in alone if other != names]
        for place in torch.randperm(len(others), generator=draw)[:partners].tolist():
            other = others[place]
            wrong = text[other] if contrast else None
            tasks.append(FusionTask((*names, *other), latents[names], text[names], wrong))
    return tasks


def _others(names: tuple[str, ...], text: dict[tuple[str, ...], TextStates]) -> TextStates | None:
    """Return captions of images of other adapters; those of single adapters among these, if any."""
    subsets = [states for other, states in text.items() if set(other) < set(names)]
    chosen = subsets or [states for other, states in text.items() if other != names]
    if not chosen:
        return None
    return TextStates(
        torch.cat([states.tokens for states in chosen]),
        torch.cat([states.pooled for states in chosen]),
    )
