"""``gates video plan``: what a ranker costs on many accelerators, before anything is built."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from apps.video.serving.model import MODEL, place_of
from apps.video.shapes import Shape, ShapeOptions, shape_of, shape_of_folder
from core_gates.errors import GatesError
from harness.command.verbs import Place
from harness.planning.counting import Work, count_weights, count_work
from harness.planning.memory import Exchange, exchange_of_rank, memory_of_rank
from harness.planning.price import Device, Rate, rate_of
from harness.planning.table import Line, Sections, print_plan, write_plan

Precision = Literal["bf16", "fp32"]
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
    if model is None and shape == SHAPE and (place.run_folder.path / MODEL).is_dir():
        model = str(place_of(place, None))
    print(f"planned: {model or f'{shape.network} with made-up columns'}")
    found = shape_of_folder(Path(model)) if model else shape_of(shape)
    work = count_work(found.forward, parameters=list(found.ranker.parameters()))
    if precision == "bf16":
        work = work._replace(saved=work.saved / 2)
    try:
        sections = {
            **_model_sections(found, work),
            **_rank_sections(found, work, device, gpus, batch_size, distinct, overlap),
        }
    except ValueError as error:
        raise GatesError(f"an option is wrong: {error}") from error
    print_plan(sections)
    print(write_plan(place.run_folder.path / "plan.json", sections))


def _model_sections(shape: Shape, work: Work) -> Sections:
    schema = shape.ranker.schema
    weights, in_tables = count_weights(shape.ranker, shape.ranker.tables())
    return {
        "shape": [
            Line("inputs of the network", shape.ranker.net.input_dim),
            Line("columns", len(schema.features), note=_histories(len(schema.sequences))),
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
    rates = {
        "training": (work.training, sent.total),
        "scoring": (work.forward, sent.ids + sent.vectors),
    }
    return {
        f"memory of each of {gpus} GPUs at {batch_size:,} rows": [
            Line("dense weights", memory.weights, "bytes", "fp32"),
            Line("their gradients", memory.gradients, "bytes"),
            Line("their Adam moments", memory.adam, "bytes"),
            Line("tables", memory.tables, "bytes", f"1/{gpus} of the rows, fp32"),
            Line("gradients of rows", memory.table_gradients, "bytes", "of the rows of a step"),
            Line("row-wise Adagrad", memory.adagrad, "bytes", "a number per row"),
            Line("activations", memory.activations, "bytes"),
            Line("total", memory.total, "bytes", _fit(memory.total, device)),
        ],
        "sent by each GPU in a step": _exchange_lines(sent),
        "assumptions": [
            Line("peak", device.flops, "FLOP/s"),
            Line("utilization", device.utilization),
            Line("bandwidth", device.bandwidth, "bytes/s"),
            Line("price of a GPU", device.price, "per hour", "in the currency of --device.price"),
        ],
        **{
            f"{name}, if they hold": _rate_lines(
                rate_of(*costs, device, ranks=gpus, batch_size=batch_size, overlap=overlap)
            )
            for name, costs in rates.items()
        },
    }


def _exchange_lines(sent: Exchange) -> Sequence[Line]:
    return [
        Line("ids", sent.ids, "bytes", "all-to-all"),
        Line("rows", sent.vectors, "bytes", "all-to-all"),
        Line("gradients of rows", sent.gradients, "bytes", "all-to-all"),
        Line("all-to-all", sent.all_to_all, "bytes", "the three above"),
        Line("dense gradients", sent.dense, "bytes", "ring all-reduce"),
    ]


def _rate_lines(rate: Rate) -> Sequence[Line]:
    return [
        Line("arithmetic of a step", rate.compute_s * 1e3, "ms"),
        Line("exchange of a step", rate.exchange_s * 1e3, "ms"),
        Line("rows a second", rate.rows, note=f"of all GPUs, bound by {rate.bound}"),
        Line("price of 10^9 rows", rate.price, note="in the currency of --device.price"),
    ]


def _histories(count: int) -> str:
    return f"{count} is a history" if count == 1 else f"{count} are histories"


def _fit(total: float, device: Device) -> str:
    part = total / device.memory
    return f"{part:.0%} of the memory" + ("" if part <= 1 else ": does not fit")
