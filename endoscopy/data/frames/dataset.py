"""Samples of a frame table: a frame with its targets, and whole batches of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from core_gates.errors import GatesError
from endoscopy.data.frames.cache import FrameCache
from endoscopy.data.frames.network_input import InputForm, network_input
from endoscopy.data.frames.reader import FrameReader
from endoscopy.data.frames.streams import NEEDS_DEPTH
from endoscopy.data.frames.transforms import Frame, Pipeline

LEAST_SHARE = 0.5
Batch = dict[str, Any]


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
        held = self.cache is not None and row in self.cache
        frame = self.cache.read(row) if self.cache and held else self.reader.read(row)
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
        :func:`~.network_input.network_input`; ``size_mm`` (B,) float32; ``censored`` (B,) bool;
        ``object`` and ``frame`` (B,) int64, the latter rows of the frame table.

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
