"""Memory, exchange and price of training on many devices, whose figures are assumptions."""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

from core_gates.errors import check_at_least, check_positive

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
    """Return what a rank sends in a step if every table is spread by rows over all ranks.

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
    """Return the rate of N ranks.

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
