"""How errors develop along a cycle or a forecast."""

import torch
from torch import Tensor


def drift(errors: Tensor) -> Tensor:
    """Return the size of the `trend`; a steady cycle has a drift near 0, 0.1 is the usual limit."""
    return trend(errors).abs()


def trend(errors: Tensor) -> Tensor:
    """Return the change of the fitted line over the last half, relative to the mean of that half.

    Args:
        errors: (T, ...) positive errors of every cycle.

    Returns:
        (...,), positive where the errors grow.

    Raises:
        ValueError: There are fewer than four cycles.
    """
    if len(errors) < 4:
        raise ValueError(f"drift needs at least four cycles, found {len(errors)}")
    half = errors[len(errors) // 2 :].double()
    time = torch.arange(len(half), dtype=torch.float64) - (len(half) - 1) / 2
    slope: Tensor = torch.tensordot(time, half, dims=1) / time.square().sum()
    return slope * len(half) / half.mean(0)


def recovery_time(
    errors: Tensor, outage: tuple[int, int], *, hours: float = 6.0, tolerance: float = 1.1
) -> Tensor:
    """Return how long after an outage the errors are back at their level before it.

    Args:
        errors: (T, ...) analysis errors of every cycle.
        outage: First cycle without observations, and first cycle with observations again.
        hours: Length of a cycle.
        tolerance: Accepted error, in units of the mean over as many cycles before the outage as it
            lasted.

    Returns:
        (...,) hours from the first cycle with observations to the first accepted error, 0 if that
        is at once, infinite if it does not come.

    Raises:
        ValueError: The outage does not lie inside the series.
    """
    start, stop = outage
    if not 0 < start < stop < len(errors):
        raise ValueError(f"an outage {outage} does not lie inside {len(errors)} cycles")
    level = errors[max(0, 2 * start - stop) : start].mean(0)
    accepted = errors[stop:] <= tolerance * level
    first = accepted.int().argmax(0) * hours
    return torch.where(accepted.any(0), first, torch.inf)
