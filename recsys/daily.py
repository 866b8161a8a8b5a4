"""A ranker that is trained further every day, on vocabularies and tables that grow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from core_gates.errors import GatesError
from recsys.embedding.row_wise_adagrad import RowWiseAdagrad
from recsys.ranker_module import JoinedOptimizer, MultiTaskModule
from recsys.transform import FeatureTransform

TENSORS, TRANSFORM = "state.safetensors", "transform"


class DailyState(NamedTuple):
    """What a day leaves to the next one.

    Attributes:
        weights: Of the module, by name.
        optimizer: Tensors of the state of its optimizers by ``optimizer.parameter.name``: moments
            of Adam, accumulators of row-wise Adagrad.
        transform: Vocabularies and scales that the tables belong to.
    """

    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    transform: FeatureTransform

    @classmethod
    def of(
        cls, module: MultiTaskModule, optimizer: Mapping[str, Any], transform: FeatureTransform
    ) -> DailyState:
        """Return the state of a trained module.

        Args:
            module: Trained.
            optimizer: ``state_dict`` of its optimizers, a
                `recsys.ranker_module.JoinedOptimizer`.
            transform: What it was trained with.
        """
        sums = {
            f"{number}.{place}.{name}": torch.as_tensor(value)
            for number, inner in enumerate(optimizer["optimizers"])
            for place, state in inner["state"].items()
            for name, value in state.items()
        }
        return cls(module.state_dict(), sums, transform)

    def save(self, folder: Path) -> None:
        """Write tensors and transform into an empty folder."""
        tensors = {f"weights.{name}": value for name, value in self.weights.items()}
        tensors |= {f"optimizer.{name}": value for name, value in self.optimizer.items()}
        kept = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
        save_file(kept, folder / TENSORS)
        self.transform.save(folder / TRANSFORM)

    @classmethod
    def load(cls, folder: Path) -> DailyState:
        """Read what `save` wrote.

        Raises:
            GatesError: A file is missing or damaged.
        """
        path = folder / TENSORS
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise GatesError(
                f"{path} is missing or damaged ({type(error).__name__}): train the day again"
            ) from error
        weights, optimizer = (
            {n.removeprefix(first): t for n, t in tensors.items() if n.startswith(first)}
            for first in ("weights.", "optimizer.")
        )
        return cls(weights, optimizer, FeatureTransform.load(folder / TRANSFORM))


def restore(module: MultiTaskModule, state: DailyState) -> MultiTaskModule:
    """Build a module as it was after a day, in place, and return it."""
    module.build(state.transform)
    module.load_state_dict(dict(state.weights))
    return module


def continue_from(
    module: MultiTaskModule, state: DailyState, rows: pl.DataFrame
) -> FeatureTransform:
    """Build a module as it was after a day, in place, and grow it by the values of new rows.

    Rows of tables that exist, and their accumulators, keep their bits; the module's optimizers will
    start from where they were.

    Args:
        module: With the settings that it was trained with, not yet built.
        state: Of the day before.
        rows: Training rows of the new day.

    Returns:
        The grown transform, to train and to score with.

    Raises:
        GatesError: A column is missing, or has values that cannot be read.
    """
    restore(module, state)
    optimizer = module.configure_optimizers()
    optimizer.load_state_dict(_nested(optimizer, state.optimizer))
    transform = state.transform.grow(rows)
    tables = next((o for o in optimizer.optimizers if isinstance(o, RowWiseAdagrad)), None)
    module.ranker.grow(transform.sizes, tables)
    module.optimizer_start = optimizer.state_dict()
    return transform


def _nested(optimizer: JoinedOptimizer, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the state of optimizers, with their present learning rates."""
    packed = optimizer.state_dict()
    for name, value in tensors.items():
        number, place, key = name.split(".", 2)
        state = packed["optimizers"][int(number)]["state"]
        state.setdefault(int(place), {})[key] = value
    return packed
