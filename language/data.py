"""Batches of windows of a packed corpus, in an order that depends on seed and epoch alone."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core_gates.errors import GatesError, check_at_least
from harness.files import Data, short_digest
from harness.files.atomic import locked
from language.corpus import PYTHON, SPLITS, Document, Split, read_corpus, source_files
from language.shards import INDEX, VERSION, ShardSet, write_shards
from language.tokenizer import Tokenizer, load_tokenizer


class WindowLoader:
    """Batches of windows of ``context + 1`` tokens, in order, each from the last token of another.

    A pass has ``(T - 1) // context`` windows. Those that fill no batch are left out, so that all
    ranks have equally many batches of the same size.

    Args:
        tokens: (T,) tokens, such as a memory map.
        context: Tokens that are predicted in a window.
        batch_size: Windows of a step over all ranks; all windows where there are fewer.
        rank: This rank.
        world: Ranks.

    Attributes:
        position: Batch that comes next in the pass that runs, or ran last.

    Raises:
        GatesError: There are fewer windows than ranks, or ranks would have unequal batches.
    """

    def __init__(
        self,
        tokens: NDArray[Any],
        context: int,
        batch_size: int,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        check_at_least(1, context=context, batch_size=batch_size, world=world)
        self.tokens, self.context, self.rank, self.world = tokens, context, rank, world
        self.windows = (len(tokens) - 1) // context
        if batch_size % world:
            raise GatesError(
                f"batch_size {batch_size} cannot be split evenly by {world} processes: choose a "
                f"multiple of {world}"
            )
        if self.windows < world:
            raise GatesError(
                f"{len(tokens)} tokens have {self.windows} windows of context {context} for "
                f"{world} processes: give more text, or lower the context"
            )
        self.batch_size = min(batch_size, self.windows - self.windows % world)
        self.position = self._start = 0

    def __len__(self) -> int:
        """Return the number of batches of a pass."""
        return self.windows // self.batch_size

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the windows of this rank: (batch_size / world, context + 1) int64."""
        starts, within = self.starts(), np.arange(self.context + 1)
        self.position, self._start = self._start, 0
        for number in range(self.position, len(self)):
            self.position = number + 1
            first, last = number * self.batch_size, (number + 1) * self.batch_size
            places = starts[first + self.rank : last : self.world, None] + within
            yield torch.from_numpy(self.tokens[places % len(self.tokens)].astype(np.int64))

    def starts(self) -> NDArray[np.int64]:
        """Return the first token of each window, in order."""
        return np.arange(self.windows) * self.context


class TrainingLoader(WindowLoader):
    """Windows in an order of the epoch, on the circle of all tokens, from an offset of the epoch.

    Args:
        tokens: (T,) tokens, such as a memory map.
        context: Tokens that are predicted in a window.
        batch_size: Windows of a step over all ranks; all windows where there are fewer.
        seed: Of order and offset.
        rank: This rank.
        world: Ranks.

    Raises:
        GatesError: There are fewer windows than ranks, or ranks would have unequal batches.
    """

    def __init__(
        self,
        tokens: NDArray[Any],
        context: int,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        super().__init__(tokens, context, batch_size, rank=rank, world=world)
        self.seed, self.epoch = seed, 0

    @property
    def sampler(self) -> TrainingLoader:
        """The object that Lightning tells the epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        self.epoch = epoch

    def starts(self) -> NDArray[np.int64]:
        """Return the first token of each window, in the order of the epoch."""
        generator = np.random.default_rng((self.seed, self.epoch))
        return generator.permutation(super().starts()) + generator.integers(len(self.tokens))

    def state_dict(self) -> dict[str, int]:
        """Return the batch that comes next, and its epoch."""
        return {"position": self.position, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at the batch of ``state``, without reading those before it."""
        self.epoch = state["epoch"]
        self.position = self._start = state["position"] % len(self)


class LanguageDataModule(L.LightningDataModule):
    """Windows of a corpus, packed once.

    Batches are int64 (B, context + 1): all but the last token predict all but the first.

    Args:
        corpus: Files, folders, or ``python``, see `language.corpus.read_corpus`.
        tokenizer: ``bytes``, a ``tokenizer.json``, or a folder that holds one.
        context: Tokens that are predicted in a window.
        batch_size: Windows of a step over all ranks.
        cache_folder: Where shards are kept, in a folder for each state of the files and each
            tokenizer. All ranks must see it. None: every process packs into a temporary folder.
        seed: Of the order.

    Attributes:
        skipped: Number of files that were passed over when the corpus was packed, see
            `language.corpus.Corpus`; empty where it was packed before.

    Raises:
        ValueError: A size is below 1, the seed is negative, or no corpus is named.
    """

    def __init__(
        self,
        corpus: tuple[str, ...] = ("python",),
        tokenizer: str = "bytes",
        context: int = 256,
        batch_size: int = 32,
        cache_folder: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_at_least(1, context=context, batch_size=batch_size)
        check_at_least(0, seed=seed)
        if not corpus:
            raise ValueError("corpus names nothing; name files, folders, or python")
        self.corpus, self.tokenizer = tuple(corpus), tokenizer
        self.context, self.batch_size, self.seed = context, batch_size, seed
        self.cache_folder = cache_folder
        self.prepare_data_per_node = False
        self.skipped: Mapping[str, int] = {}
        self._shards: ShardSet | None = None

    def prepare_data(self) -> None:
        """Pack the corpus, unless it is packed already; one process does so for all, others wait.

        Raises:
            GatesError: Corpus or tokenizer cannot be read.
        """
        if self.cache_folder is not None:
            self._packed(self.cache_folder)

    def setup(self, stage: str) -> None:  # noqa: ARG002
        """Open the shards, see `shards`."""
        assert self.shards

    @property
    def shards(self) -> ShardSet:
        """The packed corpus, opened once.

        Raises:
            GatesError: It cannot be made or is damaged, or a split has no document or fewer tokens
                than a window.
        """
        if self._shards is None:
            folder = self.cache_folder
            if folder is None:
                folder = tempfile.mkdtemp(prefix="language-")
                weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            opened = ShardSet.open(self._packed(folder))
            self._refuse_short(opened)
            self._shards = opened
        return self._shards

    def _packed(self, cache_folder: str) -> Path:
        """Return the folder of the shards, which are made if there are none."""
        tokenizer = load_tokenizer(self.tokenizer)
        state = [VERSION, tokenizer.digest, [_state(source) for source in self.corpus]]
        folder = Path(cache_folder) / short_digest(state)
        if not (folder / INDEX).is_file():
            lock = folder.with_name(f".{folder.name}.packing.lock")
            with locked(lock, folder, "name another cache_folder", wait=True):
                self._pack(tokenizer, folder)
        return folder

    def _pack(self, tokenizer: Tokenizer, folder: Path) -> None:
        """Pack the corpus, unless another process has done so in the meantime."""
        if not (folder / INDEX).is_file():
            corpus = read_corpus(self.corpus)
            self.skipped = corpus.skipped
            write_shards(corpus, tokenizer, folder)

    def _refuse_short(self, shards: ShardSet) -> None:
        """Refuse a split without a document or without a window."""
        counts = {split: len(shards.documents(split)) for split in SPLITS}
        named = f"the corpus {' '.join(self.corpus)}"
        for split, count in counts.items():
            if not count:
                raise GatesError(
                    f"{named} has {sum(counts.values())} documents and none for {split}, which the "
                    "hash of a path decides: give more files"
                )
        for split in SPLITS:
            if (tokens := shards.part(split).tokens) <= self.context:
                raise GatesError(
                    f"the {split} part of {named} has {tokens} tokens, a window has "
                    f"{self.context + 1}: give more text, or lower the context"
                )

    def held_out(self, split: Split) -> list[Document]:
        """Return the documents of a split, read again.

        Raises:
            GatesError: The corpus cannot be read, or is not what was packed.
        """
        corpus = read_corpus(self.corpus)
        if corpus.digest != self.shards.corpus_digest:
            raise GatesError(
                f"the corpus {' '.join(self.corpus)} is not the one that was packed into "
                f"{self.shards.folder}: remove that folder, and start again with the files as they "
                "are"
            )
        return corpus.part(split)

    def digest(self) -> list[Data]:
        """Describe the documents of every split, and the tokenizer, by their content."""
        name = " ".join(Path(source).name for source in self.corpus)
        parts = {split: self.shards.part(split) for split in SPLITS}
        tokenizer = self.shards.tokenizer
        return [
            *(Data(name, split, part.digest, part.bytes) for split, part in parts.items()),
            Data("tokens", "tokenizer", tokenizer.digest, tokenizer.vocab_size, "tokens"),
        ]

    def training_objects(self) -> list[str]:
        """Return a short hash of every training document."""
        return self.shards.part("train").objects

    def test_objects(self) -> list[str]:
        """Return a short hash of every test document."""
        return self.shards.part("test").objects

    def train_dataloader(self) -> TrainingLoader:
        """Return the training windows of this rank."""
        rank, world = self._rank()
        tokens = self.shards.tokens("train")
        return TrainingLoader(
            tokens, self.context, self.batch_size, seed=self.seed, rank=rank, world=world
        )

    def evaluation_loader(self, split: Split) -> WindowLoader:
        """Return the windows of a split, those of this rank, in order."""
        rank, world = self._rank()
        tokens = self.shards.tokens(split)
        return WindowLoader(tokens, self.context, self.batch_size, rank=rank, world=world)

    def val_dataloader(self) -> WindowLoader:
        """Return the validation windows of this rank."""
        return self.evaluation_loader("validation")

    def test_dataloader(self) -> WindowLoader:
        """Return the test windows of this rank."""
        return self.evaluation_loader("test")

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)


def _state(source: str) -> list[Any]:
    """Return what tells whether a source or its files have changed, without reading them."""
    place = source if source == PYTHON else str(Path(source).resolve())
    files = ((name, place.lstat()) for name, place in source_files(source))
    return [source == PYTHON, place, [[name, of.st_size, of.st_mtime_ns] for name, of in files]]
