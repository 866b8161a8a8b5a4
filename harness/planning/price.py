"""Rows a second and their price, on a device whose figures are assumptions."""

from typing import NamedTuple

from core_gates.errors import check_positive


class Device(NamedTuple):
    """An accelerator, as assumed.

    Attributes:
        flops: Peak operations a second in the dtype of the run.
        utilization: Fraction of them that is reached.
        memory: Bytes.
        bandwidth: Bytes a second that a rank sends to others.
        price: Of an hour, in any currency.
    """

    flops: float
    utilization: float
    memory: float
    bandwidth: float
    price: float

    def check(self) -> None:
        """Refuse figures that make no sense.

        Raises:
            ValueError: One is not positive, or the utilization is above 1.
        """
        check_positive(**self._asdict())
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
    device.check()
    compute = flops * batch_size / (device.flops * device.utilization)
    exchange = sent / device.bandwidth
    step = max(compute, exchange) if overlap else compute + exchange
    rows = ranks * batch_size / step
    price = device.price * ranks * 1e9 / rows / 3600
    bound = "arithmetic" if compute >= exchange else "communication"
    return Rate(compute, exchange, rows, price, bound)
