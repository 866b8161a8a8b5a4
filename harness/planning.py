"""What a model costs before it is built: weights, arithmetic, memory, exchange, price."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from core_gates.errors import GatesError, check_at_least, check_positive
from harness.runs.terminal import Line, Sections
from harness.step_cost import StepCost

MOST = 10**6  # GPUs, samples of a step, or experts


class Work(NamedTuple):
    """What one row costs.

    Attributes:
        forward: Floating-point operations of the forward pass, a multiplication and an addition
            counted as two; those of matmuls, convolutions and attention only.
        training: Of forward and backward pass.
        saved: Bytes that the forward pass keeps for the backward pass, in the dtypes of the run.
    """

    forward: float
    training: float
    saved: float


def check_counts(**found: int) -> None:
    """Refuse options of a plan that count nothing, or more than there is.

    Raises:
        GatesError: One is below 1 or above a million.
    """
    for name, value in found.items():
        if not 1 <= value <= MOST:
            raise GatesError(f"--{name} is {value}, expected 1 to {MOST:,}")


def count_weights(module: nn.Module, tables: Iterable[Tensor] = ()) -> tuple[int, int]:
    """Return the number of weights outside and inside of tables; shared ones count once."""
    inside = {id(table): table.numel() for table in tables}
    outside = {id(p): p.numel() for p in module.parameters() if id(p) not in inside}
    return sum(outside.values()), sum(inside.values())


def count_work(
    forward: Callable[[int], Tensor], *, batch_size: int = 64, parameters: Iterable[Tensor] = ()
) -> Work:
    """Count the work of a row, as the difference of two batch sizes: constants do not count.

    Args:
        forward: Runs a module on made-up rows, that many, and returns its output (rows, ...).
        batch_size: Rows; the other batch has twice as many.
        parameters: Their memory is not that of activations.
    """
    storages = {_storage(parameter) for parameter in parameters}
    small, large = (_run(forward, n, storages) for n in (batch_size, 2 * batch_size))
    return Work(*((b - a) / batch_size for a, b in zip(small, large, strict=True)))


def _run(forward: Callable[[int], Tensor], rows: int, storages: set[int]) -> Work:
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in storages:
            saved.setdefault(_storage(tensor), tensor)
        return tensor

    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            output = forward(rows)
        ahead = counter.get_total_flops()
        output.sum().backward()
    kept = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    return Work(ahead, counter.get_total_flops(), kept)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


WEIGHT = 4  # bytes: weights, gradients and states of optimizers are float32
ADAM = 8  # bytes per weight: two moments
ADAGRAD = 4  # bytes per row: one accumulator (row-wise)
ID = 8  # bytes of an id: int64


class Table(NamedTuple):
    """Rows of one width, looked up in a step.

    Attributes:
        rows: Rows of all tables of this width.
        dim: Features of a row.
        lookups: Rows that are looked up per row of the batch.
    """

    rows: int
    dim: int
    lookups: float


class Memory(NamedTuple):
    """Bytes of one rank, by what they are for.

    Attributes:
        weights: Dense weights, on every rank.
        gradients: Of the dense weights.
        adam: Moments of the dense weights.
        tables: Rows of tables, an N-th of them on each rank.
        table_gradients: Of the rows looked up in a step, each occurrence once.
        adagrad: Accumulators of the rows.
        activations: What the forward pass keeps for the backward pass.
    """

    weights: float
    gradients: float
    adam: float
    tables: float
    table_gradients: float
    adagrad: float
    activations: float

    @property
    def total(self) -> float:
        """Sum of all."""
        return float(sum(self))


class Exchange(NamedTuple):
    """Bytes that one rank sends in a step.

    Attributes:
        ids: All-to-all: ids, to the ranks that have their rows.
        vectors: All-to-all: rows, to the ranks that have asked for them.
        gradients: All-to-all: gradients of rows, back to where the rows are.
        dense: All-reduce (ring) of the gradients of dense weights.
    """

    ids: float
    vectors: float
    gradients: float
    dense: float

    @property
    def all_to_all(self) -> float:
        """Bytes that the sharded tables cost."""
        return self.ids + self.vectors + self.gradients

    @property
    def total(self) -> float:
        """Sum of all."""
        return float(sum(self))


def memory_of_rank(
    dense: int, tables: list[Table], activations: float, *, ranks: int, batch_size: int
) -> Memory:
    """Return the memory of a rank with Adam for dense weights and row-wise Adagrad for tables.

    Args:
        dense: Dense weights.
        tables: Tables, by width; rows are spread evenly over the ranks.
        activations: Bytes per row.
        ranks: N.
        batch_size: B; ids are spread evenly as well, so a rank gets gradients of as many rows as
            it asks for.

    Raises:
        ValueError: A number is below 1.
    """
    check_at_least(1, ranks=ranks, batch_size=batch_size)
    return Memory(
        WEIGHT * dense,
        WEIGHT * dense,
        ADAM * dense,
        sum(WEIGHT * t.rows * t.dim for t in tables) / ranks,
        sum((WEIGHT * t.dim + ID) * t.lookups for t in tables) * batch_size,
        sum(ADAGRAD * t.rows for t in tables) / ranks,
        activations * batch_size,
    )


def exchange_of_rank(
    dense: int, tables: list[Table], *, ranks: int, batch_size: int, distinct: float = 1.0
) -> Exchange:
    """Return the traffic of a rank in a step if all tables are split by rows over all ranks.

    Of what is looked up, (N − 1) / N lies on other ranks. A ring all-reduce sends 2 (N − 1) / N of
    the gradients.

    Args:
        dense: Dense weights.
        tables: Tables, by width.
        ranks: N.
        batch_size: B.
        distinct: Fraction of the ids of a batch that is sent; below 1 where repeated ids are.

    Raises:
        ValueError: A number is below 1, or ``distinct`` is not in (0, 1].
    """
    check_at_least(1, ranks=ranks, batch_size=batch_size)
    if not 0 < distinct <= 1:
        raise ValueError(f"distinct must lie in (0, 1], got {distinct}")
    sent = batch_size * distinct * (ranks - 1) / ranks
    vectors = sent * sum(WEIGHT * t.dim * t.lookups for t in tables)
    ids = sent * sum(ID * t.lookups for t in tables)
    return Exchange(ids, vectors, vectors, 2 * (ranks - 1) / ranks * WEIGHT * dense)


@dataclass(frozen=True)
class Device:
    """An accelerator, as assumed.

    Attributes:
        flops: Peak operations a second, in the type of the activations.
        utilization: Fraction of the peak that is reached.
        memory: Bytes of memory.
        bandwidth: Bytes a second that one accelerator sends to others.
        price: Price of an hour, in any currency.

    Raises:
        ValueError: A figure is not positive, or the utilization is above 1.
    """

    flops: float = 1e15
    utilization: float = 0.4
    memory: float = 80e9
    bandwidth: float = 50e9
    price: float = 2.5

    def __post_init__(self) -> None:
        """Refuse figures that make no sense."""
        check_positive(**dataclasses.asdict(self))
        if self.utilization > 1:
            raise ValueError(f"utilization must be at most 1, got {self.utilization}")


class Rate(NamedTuple):
    """What N devices process.

    Attributes:
        compute_s: Seconds of arithmetic in a step.
        exchange_s: Seconds of communication in a step.
        rows: Rows a second of all devices together.
        price: Of 10⁹ rows.
        bound: ``arithmetic`` or ``communication``.
    """

    compute_s: float
    exchange_s: float
    rows: float
    price: float
    bound: str


def rate_of(
    flops: float, sent: float, device: Device, *, ranks: int, batch_size: int, overlap: bool = True
) -> Rate:
    """Return step times, rows per second and price of training on N devices.

    Args:
        flops: Operations per row.
        sent: Bytes that a rank sends in a step.
        device: Each of the N devices.
        ranks: N.
        batch_size: Rows per rank and step.
        overlap: Whether communication and arithmetic take place at the same time; the longer of
            the two counts, else their sum.
    """
    compute = flops * batch_size / (device.flops * device.utilization)
    exchange = sent / device.bandwidth
    step = max(compute, exchange) if overlap else compute + exchange
    rows = ranks * batch_size / step
    price = device.price * ranks * 1e9 / rows / 3600
    bound = "arithmetic" if compute >= exchange else "communication"
    return Rate(compute, exchange, rows, price, bound)


def training_sections(
    name: str,
    network: nn.Module,
    cost: StepCost,
    device: Device,
    *,
    gpus: int,
    batch_size: int,
    sharded: bool,
    unit: str = "sample",
    units: int = 1,
    parts: Iterable[nn.Module] | None = None,
) -> Sections:
    """Return the figures of a network that is trained on many GPUs, by section.

    Args:
        name: Of the network, before the title of every section.
        network: On the meta device.
        cost: Of a step of ``batch_size`` rows.
        device: Each of the GPUs.
        gpus: Number of GPUs.
        batch_size: Rows of a GPU in a step.
        sharded: Weights, gradients and moments are spread over the GPUs (FSDP2), not on each (DDP).
        unit: What arithmetic and rate are given for.
        units: How many of them a row has.
        parts: What FSDP2 gathers one after another; by default the children of the network, and the
            entries of lists among them.
    """
    weights, _ = count_weights(network)
    sent = exchange_of_rank(weights, [], ranks=gpus, batch_size=batch_size).dense
    sent *= 1.5 if sharded else 1  # two gathers and a scatter, for one reduction
    rate = rate_of(cost.training / batch_size, sent, device, ranks=gpus, batch_size=batch_size)
    of_batch = batch_size * units
    return {
        f"{name}: network": [Line("parameters", weights, note=f"{weights:,}")],
        f"{name}: arithmetic of a {unit}": [
            Line("forward", cost.forward / of_batch, "FLOP", "a multiply-add is two"),
            Line("training", cost.training / of_batch, "FLOP", "with what is computed again"),
        ],
        f"{name}: memory of each of {gpus} GPUs": _memory_lines(
            network, cost, device, gpus, list(parts or _children(network)) if sharded else []
        ),
        f"{name}: memory of a forward pass": _inference_lines(network, cost),
        f"{name}: rate, if the device is as assumed": [
            Line("arithmetic of a step", rate.compute_s, "s"),
            Line("exchange of a step", rate.exchange_s, "s", f"{sent / 1e9:.3g} GB from each GPU"),
            Line(
                f"{unit}s a second", rate.rows * units, note=f"of all GPUs, bound by {rate.bound}"
            ),
            Line("peak", device.flops, "FLOP/s", f"reached to {device.utilization:.0%}"),
            Line(
                f"price of 10^9 {unit}s",
                rate.price / units,
                note="in the currency of --device.price",
            ),
        ],
    }


def _children(network: nn.Module) -> list[nn.Module]:
    modules: list[nn.Module] = []
    for child in network.children():
        modules += list(child.children()) if isinstance(child, nn.ModuleList) else [child]
    return modules


def _copies(network: nn.Module) -> list[Line]:
    """Return the copies of the weights that autocast makes and keeps until the end of a step."""
    weights, size = count_weights(network)[0], next(network.parameters()).element_size()
    note = "made by autocast, kept to the end of the pass"
    return [Line("bf16 copies of weights", size * weights, "bytes", note)] if size < WEIGHT else []


def _inference_lines(network: nn.Module, cost: StepCost) -> list[Line]:
    """Return the memory of a GPU in a forward pass without gradients."""
    lines = [
        Line("weights", WEIGHT * count_weights(network)[0], "bytes", "fp32"),
        *_copies(network),
        Line("activations", cost.inference, "bytes"),
    ]
    return [*lines, Line("total", sum(line.value for line in lines), "bytes")]


def _memory_lines(
    network: nn.Module, cost: StepCost, device: Device, gpus: int, gathered: list[nn.Module]
) -> list[Line]:
    """Return the memory of a GPU in training; of a network without parts every GPU has all."""
    weights, _ = count_weights(network)
    gradients, note = WEIGHT * weights, "buckets of DDP, which stay"
    shards = 1
    if gpus == 1:
        size = next(network.parameters()).element_size()
        gradients = (cost.with_gradients - cost.activations) * WEIGHT // size
        note = "those at the fullest moment"
    elif gathered:
        gradients, note, shards = WEIGHT * weights // gpus, f"1/{gpus}", gpus
    lines = [
        Line("weights", WEIGHT * weights / shards, "bytes", "fp32"),
        Line("their gradients", gradients, "bytes", note),
        Line("their Adam moments", ADAM * weights / shards, "bytes"),
        *_copies(network),
        Line("activations", cost.activations, "bytes", "at the fullest moment"),
    ]
    if shards > 1:
        largest = max(count_weights(part)[0] for part in gathered)
        note = "fp32, whole: the block in use and the next one, each as large as the largest"
        at_once = Line("gathered weights", 2 * WEIGHT * largest, "bytes", note)
        lines.insert(3, at_once)
    total = sum(line.value for line in lines)
    part = total / device.memory
    fit = f"{part:.0%} of the memory" + ("" if part <= 1 else ": does not fit")
    return [*lines, Line("total", total, "bytes", fit)]
