"""Batches of randomly changed adapters, each with a random caption."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from core_gates.collectives import num_ranks, rank_in
from core_gates.errors import check_at_least, check_fraction
from diffusion.data.published_table import Example
from diffusion.library import TextEncoder
from diffusion.lora_file.container import LoraFileError, clean
from diffusion.lora_file.family import Placed
from diffusion.retrieval.encoder import AdapterBatch, collate
from diffusion.retrieval.encoder_config import EncoderConfig, modules_of, refusal_of

AT_A_TIME = 256


class Captions:
    """The embedded captions of adapters.

    Args:
        examples: Adapters with captions.
        encoder: Embeds each different text once.

    Attributes:
        embeddings: (C, text_dim), one row per different text.
        index: (n, K) rows of the captions of each adapter, padded.
        weights: (n, K) how often each is drawn, 0 for padding.

    Raises:
        LoraFileError: An adapter has no caption, or the text encoder returns something else.
    """

    def __init__(self, examples: Sequence[Example], encoder: TextEncoder) -> None:
        for number, example in enumerate(examples):
            if not any(caption.strip() for caption in example.captions):
                name = clean(example.concept, 60)
                raise LoraFileError(f"adapter {number + 1} ({name}) has no caption: give it one")
        texts = {text: None for example in examples for text in example.captions}
        rows = {text: number for number, text in enumerate(texts)}
        self.texts = list(rows)
        self.embeddings = embedded(self.texts, encoder)
        most = max(len(example.captions) for example in examples)
        self.index = torch.zeros(len(examples), most, dtype=torch.int64)
        self.weights = torch.zeros(len(examples), most)
        for number, example in enumerate(examples):
            own = torch.tensor([rows[text] for text in example.captions])
            self.index[number, : len(own)] = own
            given = example.weights
            self.weights[number, : len(own)] = 1.0 if given is None else torch.tensor(given)

    def draw(self, adapters: Tensor) -> Tensor:
        """Return the embedding (n, text_dim) of a random caption of each adapter."""
        chosen = torch.multinomial(self.weights[adapters], 1)
        return self.embeddings[self.index[adapters].gather(1, chosen)[:, 0]]

    def all(self) -> tuple[Tensor, Tensor]:
        """Return the embeddings of all captions (Q, text_dim), and the adapter of each (Q,)."""
        adapters, places = self.weights.nonzero(as_tuple=True)
        return self.embeddings[self.index[adapters, places]], adapters


def embedded(texts: Sequence[str], encoder: TextEncoder) -> Tensor:
    """Return the embeddings (n, text_dim) of texts.

    Raises:
        LoraFileError: The encoder returns something else than finite vectors of unit length.
    """
    parts = [
        encoder.embed(texts[start : start + AT_A_TIME]).detach().float().cpu()
        for start in range(0, len(texts), AT_A_TIME)
    ]
    found = torch.cat(parts)
    if len(found) != len(texts) or not (found.norm(dim=1) - 1).abs().lt(1e-3).all():
        raise LoraFileError(
            f"the text encoder returned {tuple(found.shape)} for {len(texts)} texts, expected one "
            "finite vector of unit length each"
        )
    return found


@dataclass(frozen=True)
class Augmentation:
    """How adapters are changed at random.

    Attributes:
        smallest_scale: Lower end of the strength that an adapter is multiplied by.
        largest_scale: Upper end.
        dropped: Largest probability that a type of layers, and that a layer, is left out; each
            adapter draws its own below this. One layer always stays.
        kept_rank: Smallest fraction of the components that are kept, after a random rotation; 1
            keeps all of them.
        noise: Standard deviation of what is added to A, relative to its root mean square.

    Raises:
        ValueError: A number is out of range.
    """

    smallest_scale: float = 0.7
    largest_scale: float = 1.3
    dropped: float = 0.5
    kept_rank: float = 0.25
    noise: float = 0.1

    def __post_init__(self) -> None:
        check_at_least(0, smallest_scale=self.smallest_scale, noise=self.noise)
        check_at_least(self.smallest_scale, largest_scale=self.largest_scale)
        check_fraction(dropped=self.dropped)
        if not 0 < self.kept_rank <= 1:
            raise ValueError(f"kept_rank must lie in (0, 1], got {self.kept_rank}")

    @torch.no_grad()
    def __call__(self, batch: AdapterBatch, modules: tuple[Placed, ...]) -> AdapterBatch:
        """Return changed adapters; the given ones stay as they are.

        Args:
            batch: n adapters.
            modules: The fused layers that ``batch.present`` is about.
        """
        like = next(iter(batch.down.values()))
        spread = self.largest_scale - self.smallest_scale
        scale = self.smallest_scale + spread * _uniform(like, len(like), 1, 1)
        present = self._present(batch.present, modules, like)
        kept = self.kept_rank + (1 - self.kept_rank) * _uniform(like, len(like), 1)
        down, up = {}, {}
        for number, module in enumerate(modules):
            stays = present[:, number, None, None]
            for part in module.parts:
                if part in batch.down:
                    a, b = rotated(batch.down[part], batch.up[part])
                    keep = _kept(a, kept)[..., None]
                    down[part] = self._noisy(a * keep) * keep * stays
                    up[part] = b * keep.mT * scale * stays
        return AdapterBatch(down, up, present)

    def _present(self, present: Tensor, modules: tuple[Placed, ...], like: Tensor) -> Tensor:
        """Return which layers stay, (n, M)."""
        kinds = list(dict.fromkeys(module.type for module in modules))
        index = torch.tensor([kinds.index(module.type) for module in modules], device=like.device)
        rate = self.dropped * _uniform(like, len(like), 1)
        by_kind = _uniform(like, len(like), len(kinds)) >= rate
        stays = present & by_kind[:, index] & (_uniform(like, *present.shape) >= rate)
        return torch.where(stays.any(1, keepdim=True), stays, present)

    def _noisy(self, down: Tensor) -> Tensor:
        if not self.noise:
            return down
        size = down.square().mean((1, 2), keepdim=True).sqrt()
        return down + self.noise * size * torch.randn_like(down)


def rotated(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return other factors of the same product: A and B reflected at a random direction.

    Components that are zero in A, such as those of padding, stay zero.

    Args:
        down: A (n, r, in_features).
        up: B (n, out_features, r).
    """
    used = down.ne(0).any(2, keepdim=True)
    normal = torch.randn(*down.shape[:2], 1, dtype=down.dtype, device=down.device) * used
    length = torch.linalg.vector_norm(normal, dim=1, keepdim=True)
    normal = normal / length.clamp_min(torch.finfo(down.dtype).tiny)
    return down - 2 * normal @ (normal.mT @ down), up - 2 * (up @ normal) @ normal.mT


def _kept(down: Tensor, fraction: Tensor) -> Tensor:
    """Return which components (n, r) stay, the first of those that are not zero, at least one."""
    used = down.ne(0).any(2)
    count = (fraction * used.sum(1, keepdim=True)).ceil().clamp_min(1)
    return used & (used.cumsum(1) <= count)


def _uniform(like: Tensor, *shape: int) -> Tensor:
    return torch.rand(*shape, dtype=like.dtype, device=like.device)


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
        for number, example in enumerate(examples, 1):
            if reason := refusal_of(example.bundle, config):
                raise LoraFileError(f"adapter {number} ({example.concept}): {reason}")
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
        return Pairs(self.batch(index), text, index, self.concepts[index], torch.arange(len(index)))

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
        training: Adapters with captions, see `diffusion.data.published_table.split_table`.
        config: Of the encoder.
        text_encoder: Embeds every different caption once.
        validation: Adapters that are searched by their captions after an epoch.
        batch_size: Adapters of a batch on each rank; all of them, spread over ranks, if None.
        steps_per_epoch: Batches of an epoch.
        in_memory: Whether all factors are kept in memory. Files of large models are rather read at
            every step.

    Raises:
        ValueError: A number is not positive.
        LoraFileError: See `Adapters`.
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
