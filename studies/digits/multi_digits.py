"""Two overlaid handwritten digits, a label each; no glyph is in two parts of the data."""

from __future__ import annotations

import zlib
from functools import cache
from typing import Any, Literal, NamedTuple, get_args

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from core_gates.errors import GatesError

Part = Literal["train", "validation", "test"]
SIDE, SHIFT = 10, 2  # of the canvas, and of the second glyph, in pixels
NUM_IDS = 4096
SPLIT_SEED = 0


class Pairs(NamedTuple):
    """Overlaid pairs of glyphs.

    Attributes:
        x: Pixels (N, 100) from 0 to 1, the larger of both glyphs.
        labels: The digit at the upper left and that at the lower right (N, 2), int64.
        ids: CRC-32 of the pixels modulo 4,096 (N,), int64.
        glyphs: Numbers of the two glyphs (N, 2).
    """

    x: Tensor
    labels: Tensor
    ids: Tensor
    glyphs: Tensor


class Glyphs(NamedTuple):
    """Glyphs of a part.

    Attributes:
        images: (G, 8, 8) float32 from 0 to 1.
        labels: (G,) int64.
        numbers: In scikit-learn's set (G,).
    """

    images: NDArray[np.float32]
    labels: NDArray[np.int64]
    numbers: NDArray[np.int64]


@cache
def glyphs(part: Part, sizes: tuple[int, ...]) -> Glyphs:
    """Return the glyphs of a part of the 1,797 digits of scikit-learn, in a fixed random order.

    Args:
        part: Which.
        sizes: Numbers of glyphs to train with, to choose by and to test with.

    Raises:
        GatesError: A part has no glyphs, or there are fewer in all.
    """
    from sklearn.datasets import load_digits  # takes seconds to import

    data: Any = load_digits()
    names = get_args(Part)
    if len(sizes) != len(names) or min(sizes) < 1 or sum(sizes) > len(data.target):
        raise GatesError(
            f"--glyphs is {list(sizes)}, expected one number from 1 for each of {', '.join(names)},"
            f" {len(data.target):,} in all at most: a part without glyphs has no pairs"
        )
    order = np.random.default_rng(SPLIT_SEED).permutation(len(data.target))
    place = names.index(part)
    start = sum(sizes[:place])
    rows = order[start : start + sizes[place]]
    images = (data.images[rows] / 16).astype(np.float32)
    return Glyphs(images, data.target[rows].astype(np.int64), rows.astype(np.int64))


def pairs(source: Glyphs, count: int, seed: tuple[int, ...]) -> Pairs:
    """Draw pairs of glyphs, and overlay them on a canvas of 10 x 10 pixels.

    Args:
        source: Glyphs of a part.
        count: N.
        seed: Of the drawing.
    """
    drawn = np.random.default_rng(seed).integers(len(source.labels), size=(count, 2))
    canvas = np.zeros((count, SIDE, SIDE), dtype=np.float32)
    end = SIDE - SHIFT
    canvas[:, :end, :end] = source.images[drawn[:, 0]]
    corner = canvas[:, SHIFT:, SHIFT:]
    np.maximum(corner, source.images[drawn[:, 1]], out=corner)
    x = canvas.reshape(count, SIDE * SIDE)
    ids = [zlib.crc32(row.tobytes()) % NUM_IDS for row in x]
    return Pairs(
        torch.from_numpy(x), torch.from_numpy(source.labels[drawn]), torch.tensor(ids),
        torch.from_numpy(source.numbers[drawn]),
    )  # fmt: skip


class _Batches(Dataset[Pairs]):
    """Batch i of a training, drawn from its seed and its number alone."""

    def __init__(self, source: Glyphs, num_steps: int, batch: int, seed: int) -> None:
        self.source, self.num_steps, self.batch, self.seed = source, num_steps, batch, seed

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> Pairs:
        return pairs(self.source, self.batch, (self.seed, step))


class MultiDigits(L.LightningDataModule):
    """Training batches of pairs, each drawn from the seed and the number of its step alone.

    Args:
        sizes: Glyphs of each part, see `glyphs`.
        num_steps: Batches.
        batch: Pairs of each.
        seed: Of the drawing.
    """

    def __init__(self, sizes: tuple[int, ...], num_steps: int, batch: int, seed: int) -> None:
        super().__init__()
        self.batches = _Batches(glyphs("train", sizes), num_steps, batch, seed)

    def train_dataloader(self) -> DataLoader[Pairs]:
        """Return all batches in their order."""
        return DataLoader(self.batches, batch_size=None)
