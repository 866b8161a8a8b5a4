"""``gates video plan``: what a ranker costs on many accelerators, before anything is built."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from apps.video.commands import MODEL, place_of
from core_gates.errors import GatesError, check_at_least
from harness.command.verbs import Place
from harness.planning import (
    Device,
    Table,
    Work,
    count_weights,
    count_work,
    exchange_of_rank,
    memory_of_rank,
    rate_of,
)
from harness.runs.terminal import Line, Sections, print_plan, write_plan
from recsys.model_folder import load_model
from recsys.models import build
from recsys.ranker import Ranker
from recsys.schema import Dense, Encoder, FeatureSchema, History, Sparse, Task

Precision = Literal["bf16", "fp32"]


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
    loaded = load_model(folder).ranker
    assert loaded.spec is not None  # it could not have been saved
    return _shape(
        loaded.schema, loaded.sizes, loaded.dense_width, loaded.spec.name, loaded.spec.options,
        prior=loaded.prior, encoders=loaded.encoders,
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


DEVICE, SHAPE = Device(), ShapeOptions()


def plan(
    place: Place,
    gpus: int = 8,
    model: str | None = None,
    shape: ShapeOptions = SHAPE,
    batch_size: int = 4096,
    distinct: float = 1.0,
    precision: Precision = "bf16",
    device: Device = DEVICE,
    overlap: bool = True,
) -> None:
    """Estimate weights, arithmetic, memory, exchange and price of a ranker on many GPUs.

    The network is built on the meta device: shapes without values. Arithmetic, memory and bytes
    follow from the shapes; rows a second and prices follow from the figures of the device, which
    are assumptions. Dense weights are on every GPU, with Adam; tables are spread by rows, with
    row-wise Adagrad.

    Args:
        place: Filled in by the command line.
        gpus: Number of GPUs.
        model: Folder of a model to plan for; by default that of the run, unless a shape is given.
        shape: What the ranker is made of.
        batch_size: Rows per GPU and step.
        distinct: Fraction of the rows looked up in a batch that are distinct, and so exchanged.
        precision: Type of the activations; weights and optimizers are in fp32.
        device: What is assumed of a GPU.
        overlap: Assume that exchange and arithmetic take place at the same time.
    """
    if model is not None and shape != SHAPE:
        raise GatesError("--model and --shape are both given: leave one of them out")
    if model is None and shape == SHAPE and (place.run_folder.path / MODEL).is_dir():
        model = str(place_of(place, None))
    print(f"planned: {model or f'{shape.network} with made-up columns'}")
    shape_model = shape_of_folder(Path(model)) if model else shape_of(shape)
    work = count_work(shape_model.forward, parameters=list(shape_model.ranker.parameters()))
    if precision == "bf16":
        work = work._replace(saved=work.saved / 2)
    try:
        sections = {
            **_model_sections(shape_model, work),
            **_rank_sections(shape_model, work, device, gpus, batch_size, distinct, overlap),
        }
    except ValueError as error:
        raise GatesError(f"an option is wrong: {error}") from error
    print_plan(sections)
    print(write_plan(place.run_folder.path / "plan.json", sections))


def _model_sections(shape: Shape, work: Work) -> Sections:
    schema = shape.ranker.schema
    count = len(schema.sequences)
    histories = f"{count} is a history" if count == 1 else f"{count} are histories"
    weights, in_tables = count_weights(shape.ranker, shape.ranker.tables())
    return {
        "shape": [
            Line("inputs of the network", shape.ranker.net.input_dim),
            Line("columns", len(schema.features), note=histories),
            Line("tasks", len(schema.tasks), note=f"in {len(schema.categories)} categories"),
        ],
        "weights": [
            Line("dense", weights, note="network and encoders, on every GPU"),
            Line("tables", in_tables, note=f"{sum(t.rows for t in shape.tables):,} rows"),
        ],
        "arithmetic per row": [
            Line("forward", work.forward, "FLOP", "matmuls; a multiply-add is two"),
            Line("training", work.training, "FLOP", "forward and backward"),
            Line("kept for backward", work.saved, "bytes", "of the plain path, without kernels"),
        ],
    }


def _rank_sections(
    shape: Shape,
    work: Work,
    device: Device,
    gpus: int,
    batch_size: int,
    distinct: float,
    overlap: bool,
) -> Sections:
    weights, _ = count_weights(shape.ranker, shape.ranker.tables())
    memory = memory_of_rank(weights, shape.tables, work.saved, ranks=gpus, batch_size=batch_size)
    sent = exchange_of_rank(
        weights, shape.tables, ranks=gpus, batch_size=batch_size, distinct=distinct
    )
    costs = {
        "training": (work.training, sent.total),
        "scoring": (work.forward, sent.ids + sent.vectors),
    }
    rates = {
        name: rate_of(*cost, device, ranks=gpus, batch_size=batch_size, overlap=overlap)
        for name, cost in costs.items()
    }
    part = memory.total / device.memory
    fit = f"{part:.0%} of the memory" + ("" if part <= 1 else ": does not fit")
    return {
        f"memory of each of {gpus} GPUs at {batch_size:,} rows": [
            Line("dense weights", memory.weights, "bytes", "fp32"),
            Line("their gradients", memory.gradients, "bytes"),
            Line("their Adam moments", memory.adam, "bytes"),
            Line("tables", memory.tables, "bytes", f"1/{gpus} of the rows, fp32"),
            Line("gradients of rows", memory.table_gradients, "bytes", "of the rows of a step"),
            Line("row-wise Adagrad", memory.adagrad, "bytes", "a number per row"),
            Line("activations", memory.activations, "bytes"),
            Line("total", memory.total, "bytes", fit),
        ],
        "sent by each GPU in a step": [
            Line("ids", sent.ids, "bytes", "all-to-all"),
            Line("rows", sent.vectors, "bytes", "all-to-all"),
            Line("gradients of rows", sent.gradients, "bytes", "all-to-all"),
            Line("all-to-all", sent.all_to_all, "bytes", "the three above"),
            Line("dense gradients", sent.dense, "bytes", "ring all-reduce"),
        ],
        "assumptions": [
            Line("peak", device.flops, "FLOP/s"),
            Line("utilization", device.utilization),
            Line("bandwidth", device.bandwidth, "bytes/s"),
            Line("price of a GPU", device.price, "per hour", "in the currency of --device.price"),
        ],
        **{
            f"{name}, if they hold": [
                Line("arithmetic of a step", rate.compute_s * 1e3, "ms"),
                Line("exchange of a step", rate.exchange_s * 1e3, "ms"),
                Line("rows a second", rate.rows, note=f"of all GPUs, bound by {rate.bound}"),
                Line("price of 10^9 rows", rate.price, note="in the currency of --device.price"),
            ]
            for name, rate in rates.items()
        },
    }
