"""A trained ranker with its transform: raw rows to probabilities, alike in files and requests.

N rows, F sparse features, T tasks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Tensor

from core_gates.errors import GatesError, check_at_least
from recsys.embedding.lookup import fields_of
from recsys.inputs import Rows, dense_inputs
from recsys.model_folder import load_model
from recsys.ranker import Ranker
from recsys.schema import FeatureSchema
from recsys.transform import Features, FeatureTransform
from recsys.vocabulary import MISSING, UNKNOWN

Span = tuple[int, int]
DIGITS = 12  # of the hash of a folder in the version of its model


class Scored(NamedTuple):
    """Results of N rows.

    Attributes:
        probabilities: (N, T) float32.
        unknown: (N, F), true where the value of a sparse column was not seen in training.
        missing: (N, S + H), true where the schema's sparse columns and histories have none.
    """

    probabilities: NDArray[np.float32]
    unknown: NDArray[np.bool_]
    missing: NDArray[np.bool_]


class TableScorer:
    """Score tables with a network folded for inference.

    Args:
        ranker: Trained.
        transform: Fitted to its training rows.
        block_rows: Rows that go through the network at once, at most a list more.
        owned: Whether ``ranker`` itself may be folded, which spares a copy of its tables.

    Attributes:
        task_names: Tasks, in the order of the probabilities.
        sparse_names: Sparse columns, in the order of ``unknown``.

    Raises:
        ValueError: ``block_rows`` is below 1.
    """

    def __init__(
        self,
        ranker: Ranker,
        transform: FeatureTransform,
        *,
        block_rows: int = 4096,
        owned: bool = False,
    ) -> None:
        check_at_least(1, block_rows=block_rows)
        if owned:
            ranker.net = ranker.net.folded()
            self.ranker = ranker.requires_grad_(False).eval()
        else:
            self.ranker = ranker.folded()
        self.transform, self.block_rows = transform, block_rows
        self.task_names = self.schema.task_names
        self.sparse_names = tuple(transform.sparse_tables)

    @property
    def schema(self) -> FeatureSchema:
        """What the columns are."""
        return self.transform.schema

    @property
    def encodes_users(self) -> bool:
        """Whether something of a user is worth to be computed once for a list of rows."""
        histories = self.schema.sequences
        return any(h.side == "user" and h.encoder != "mean" for h in histories)

    @torch.inference_mode()
    def score(self, table: pl.DataFrame, lists: Sequence[int] = ()) -> Scored:
        """Return probabilities of N rows; labels and further columns are not needed.

        Args:
            table: N rows.
            lists: Lengths of lists of rows that follow each other, N in all, if the rows of a list
                agree in all features of the user: these are then embedded and encoded once for
                each list, with the same results.

        Raises:
            GatesError: A column is absent or of a wrong type; a value is no number where one is
                needed; lists do not make up the table, or rows of one differ in their user.
        """
        features = self.transform.encode(table)
        if len(lists):
            self._check_lists(features, lists)
        probabilities = np.empty((len(table), len(self.task_names)), np.float32)
        for spans in self._blocks(len(table), lists):
            rows = _rows(features, (spans[0][0], spans[-1][1]))
            logits = self._of_lists(rows, spans) if len(lists) else self.ranker(*rows)
            probabilities[spans[0][0] : spans[-1][1]] = logits.sigmoid().numpy()
        absent = [features.sparse[:, : len(self.schema.sparse)] == MISSING]
        absent += [(rows == MISSING).all(1, keepdims=True) for rows in features.sequences]
        return Scored(probabilities, features.sparse == UNKNOWN, np.hstack(absent))

    def _check_lists(self, features: Features, lists: Sequence[int]) -> None:
        """Refuse lists that are not all rows, or whose rows are not of one user each."""
        count, ends = len(features.sparse), np.cumsum(lists)
        if min(lists) < 1 or ends[-1] != count:
            raise GatesError(
                f"lists have {ends[-1]} rows, the shortest {min(lists)}; expected {count} rows in "
                "all, at least one in each"
            )
        follows = np.ones(count, np.bool_)
        follows[[0, *ends[:-1]]] = False
        of_user: dict[str, NDArray[Any]] = {
            field.name: features.sparse[:, i]
            for i, field in enumerate(fields_of(self.schema))
            if field.side == "user"
        }
        for i, (name, side) in enumerate(dense_inputs(self.schema)):
            if side == "user":
                of_user[name] = features.dense[:, i]
        for history, events in zip(self.schema.sequences, features.sequences, strict=True):
            if history.side == "user":
                of_user[history.name] = events
        for name, values in of_user.items():
            changed = values[1:] != values[:-1]
            differs = (changed.any(1) if changed.ndim > 1 else changed) & follows[1:]
            if differs.any():
                row = int(differs.argmax()) + 1
                raise GatesError(
                    f"row {row} differs in {name!r} from the row before, of the same list: the "
                    "rows of a list must be of one user; cut lists where the user changes"
                )

    def _blocks(self, count: int, lists: Sequence[int]) -> Iterator[list[Span]]:
        """Yield the lists, or parts of the table, that go through the network at once."""
        if not len(lists):
            for start in range(0, count, self.block_rows):
                yield [(start, min(start + self.block_rows, count))]
            return
        block: list[Span] = []
        start = 0
        for length in lists:
            block.append((start, start + length))
            start += length
            if start - block[0][0] >= self.block_rows:
                yield block
                block = []
        if block:
            yield block

    def _of_lists(self, rows: Rows, spans: Sequence[Span]) -> Tensor:
        """Return the logits of lists of rows, what is of their users computed once."""
        inputs: list[list[Tensor]] = [[] for _ in self.ranker.input_layers]
        for start, end in spans:
            some = _some(rows, (start - spans[0][0], end - spans[0][0]))
            parts = self.ranker.user_inputs(_some(some, (0, 1)))
            for layer, part, made in zip(self.ranker.input_layers, parts, inputs, strict=True):
                made.append(layer.with_user(part, some))
        joined = [torch.cat(made) for made in inputs]
        v = joined[0] if len(joined) == 1 else torch.stack(joined, 1)
        return self.ranker.logits(v, rows.dense, self.ranker.ids(rows.sparse))


def _rows(features: Features, span: Span) -> Rows:
    """Return some of the encoded rows as tensors."""
    sparse, dense = map(torch.from_numpy, (features.sparse, features.dense))
    return _some(Rows(sparse, dense, tuple(map(torch.from_numpy, features.sequences))), span)


def _some(rows: Rows, span: Span) -> Rows:
    some = slice(*span)
    return Rows(rows.sparse[some], rows.dense[some], tuple(s[some] for s in rows.sequences))


class Model(NamedTuple):
    """A model in memory.

    Attributes:
        version: Name and hash of its folder.
        scorer: Scores tables.
    """

    version: str
    scorer: TableScorer


def read_model(folder: Path, *, int8: bool = False) -> Model:
    """Return the model of a folder.

    Args:
        folder: The folder.
        int8: Whether its tables take a byte per number in memory.

    Raises:
        GatesError: The folder holds no model, or a damaged one.
    """
    loaded = load_model(folder, int8=int8)
    version = f"{folder.resolve().name} {loaded.hash[:DIGITS]}{' int8' if int8 else ''}"
    return Model(version, TableScorer(loaded.ranker, loaded.transform, owned=True))


def refuse_infinite(found: Mapping[str, NDArray[Any]], version: str) -> None:
    """Refuse results of a model, by name, that are NaN or infinite.

    Raises:
        GatesError: One is.
    """
    for name, array in found.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            what = "a probability" if name == "p" else f"the {name}"
            raise GatesError(
                f"the model {version} gives {what} that is not finite: its training has diverged, "
                "train it again or serve another"
            )


def chosen_tasks(known: Sequence[str], tasks: Sequence[str]) -> list[int]:
    """Return the indices of tasks in ``known``, of all if none is named.

    Raises:
        GatesError: One is unknown.
    """
    places: Mapping[str, int] = {name: place for place, name in enumerate(known)}
    if unknown := [name for name in tasks if name not in places]:
        raise GatesError(f"the model has no task {unknown[0]!r}; it has {', '.join(known)}")
    return [places[name] for name in tasks] or list(places.values())
