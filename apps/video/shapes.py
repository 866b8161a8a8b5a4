"""Rankers without values: on the meta device, to be planned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from core_gates.errors import GatesError, check_at_least
from harness.planning.memory import Table
from recsys.model_folder import load_model
from recsys.models import build
from recsys.ranker import Ranker
from recsys.schema import Dense, Encoder, FeatureSchema, History, Sparse, Task


@dataclass(frozen=True)
class Columns:
    """A group of categorical columns.

    Attributes:
        count: Number of columns.
        rows: Rows of the table of each.
        dim: Features of a row.
    """

    count: int
    rows: int
    dim: int


@dataclass(frozen=True)
class Events:
    """A list column with values of the first categorical column.

    Attributes:
        length: Events kept.
        encoder: How they become one vector.
    """

    length: int
    encoder: Encoder = "mean"


@dataclass(frozen=True)
class ShapeOptions:
    """What a ranker is made of.

    Attributes:
        network: Name of the network.
        options: Options of the network, by name.
        tasks: Number of tasks by category.
        columns: Groups of categorical columns, with count, rows and dim of each.
        dense: Number of numeric columns.
        histories: List columns, with length and encoder of each.

    Raises:
        ValueError: A number is too small.
    """

    network: str = "HoME"
    options: dict[str, Any] = field(default_factory=dict)
    tasks: dict[str, int] = field(default_factory=lambda: {"watch": 5, "inter": 9})
    columns: list[Columns] = field(default_factory=lambda: [Columns(16, 1_000_000, 16)])
    dense: int = 16
    histories: list[Events] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_at_least(0, dense=self.dense)
        for group in self.columns:
            check_at_least(1, count=group.count, dim=group.dim)
            check_at_least(2, rows=group.rows)
        if self.histories and not self.columns:
            raise ValueError("histories hold values of a categorical column: add columns")


class Shape(NamedTuple):
    """A ranker and its tables.

    Attributes:
        ranker: On the meta device.
        tables: Rows, width and lookups per row.
    """

    ranker: Ranker
    tables: list[Table]

    def forward(self, rows: int) -> Tensor:
        """Return the logits of made-up rows, which have shapes but no values."""
        schema, where = self.ranker.schema, torch.device("meta")
        columns = len(self.ranker.input_layers[0].bank.fields)
        sparse = torch.zeros(rows, columns, dtype=torch.int64, device=where)
        dense = torch.zeros(rows, self.ranker.dense_width, device=where)
        histories = [
            torch.zeros(rows, h.max_length, dtype=torch.int64, device=where)
            for h in schema.sequences
        ]
        logits: Tensor = self.ranker(sparse, dense, histories)
        return logits


def shape_of_folder(folder: Path) -> Shape:
    """Return the shape of a model.

    Raises:
        GatesError: The folder holds no model.
    """
    found = load_model(folder).ranker
    assert found.spec is not None  # it could not have been saved
    return _shape(
        found.schema, found.sizes, found.dense_width, found.spec.name, found.spec.options,
        prior=found.prior, encoders=found.encoders,
    )  # fmt: skip


def shape_of(options: ShapeOptions) -> Shape:
    """Return the shape that options describe.

    Raises:
        GatesError: There is no task, the network is unknown or has no such option.
    """
    sparse = []
    sizes = {}
    for number, group in enumerate(options.columns):
        for column in range(group.count):
            sparse.append(Sparse(f"group {number} column {column}", dim=group.dim))
            sizes[sparse[-1].name] = group.rows
    try:
        schema = FeatureSchema(
            tuple(Task(f"{c} {i}", category=c) for c, n in options.tasks.items() for i in range(n)),
            tuple(sparse),
            tuple(Dense(f"number {i}") for i in range(options.dense)),
            tuple(
                History(f"history {i}", sparse[0].name, events.length, events.encoder)
                for i, events in enumerate(options.histories)
            ),
        )
    except ValueError as error:
        raise GatesError(str(error)) from error
    return _shape(schema, sizes, 2 * options.dense, options.network, options.options)


def _shape(
    schema: FeatureSchema,
    sizes: Mapping[str, int],
    dense_width: int,
    network: str,
    options: Mapping[str, Any],
    **further: Any,
) -> Shape:
    def net(input_dim: int, tasks: Sequence[Task]) -> Any:
        return build(network, options, input_dim, tasks, device="meta")

    try:
        ranker = Ranker(schema, sizes, dense_width, net, device="meta", **further)
    except ValueError as error:
        raise GatesError(str(error)) from error
    rows: dict[int, int] = {}
    lookups: dict[int, float] = {}
    for layer in ranker.input_layers:
        bank = layer.bank
        for table in bank.named_tables().values():
            rows[table.shape[1]] = rows.get(table.shape[1], 0) + table.shape[0]
        for column in bank.fields:
            halves = 2 if column.buckets else 1
            lookups[column.dim] = lookups.get(column.dim, 0) + halves
        for history in schema.sequences:
            dim = bank.field(history.of).dim
            lookups[dim] = lookups.get(dim, 0) + history.max_length
    return Shape(ranker, [Table(rows[dim], dim, lookups[dim]) for dim in sorted(rows)])
