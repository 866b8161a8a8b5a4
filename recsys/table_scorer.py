"""A trained ranker with its transform: raw rows to probabilities, alike in files and requests.

N rows, F sparse features, T tasks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from core_gates.errors import check_at_least
from recsys.ranker import Ranker
from recsys.schema import FeatureSchema
from recsys.transform import FeatureTransform
from recsys.vocabulary import UNKNOWN


class Scored(NamedTuple):
    """Results of N rows.

    Attributes:
        probabilities: (N, T) float32.
        unknown: (N, F), true where the value of a sparse column was not seen in training.
    """

    probabilities: NDArray[np.float32]
    unknown: NDArray[np.bool_]


class TableScorer:
    """Score tables with a network folded for inference.

    Args:
        ranker: Trained.
        transform: Fitted to its training rows.
        block_rows: Rows that go through the network at once.

    Attributes:
        task_names: Tasks, in the order of the probabilities.
        sparse_names: Sparse columns, in the order of ``unknown``.

    Raises:
        ValueError: ``block_rows`` is below 1.
    """

    def __init__(
        self, ranker: Ranker, transform: FeatureTransform, *, block_rows: int = 4096
    ) -> None:
        check_at_least(1, block_rows=block_rows)
        self.ranker, self.transform, self.block_rows = ranker.folded(), transform, block_rows
        self.task_names = self.schema.task_names
        self.sparse_names = tuple(transform.sparse_tables)

    @property
    def schema(self) -> FeatureSchema:
        """What the columns are."""
        return self.transform.schema

    @torch.inference_mode()
    def score(self, table: pl.DataFrame) -> Scored:
        """Return probabilities of N rows; labels and further columns are not needed.

        Raises:
            GatesError: A column is absent or of a wrong type; a value is no number where one is
                needed.
        """
        features = self.transform.encode(table)
        found = np.empty((len(table), len(self.task_names)), np.float32)
        for start in range(0, len(table), self.block_rows):
            rows = slice(start, start + self.block_rows)
            sparse, dense = (torch.from_numpy(a[rows]) for a in (features.sparse, features.dense))
            sequences = [torch.from_numpy(a[rows]) for a in features.sequences]
            found[rows] = self.ranker(sparse, dense, sequences).sigmoid().numpy()
        return Scored(found, features.sparse == UNKNOWN)
