"""Rows a second and their price, on a device whose figures are assumptions."""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

from core_gates.errors import check_positive


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
