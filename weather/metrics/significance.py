"""Whether two methods differ, from paired scores that follow each other in time."""

from typing import NamedTuple

import torch
from scipy.special import stdtr, stdtrit
from torch import Tensor


class PairedDifference(NamedTuple):
    """Mean difference of paired scores with its confidence interval.

    Attributes:
        mean: Mean of ``a - b`` (...,).
        low: Lower bound of the interval.
        high: Upper bound.
        p_value: Two-sided probability of a difference as large, were there none.
        inflation: Factor on the standard error for the autocorrelation, at least 1.
    """

    mean: Tensor
    low: Tensor
    high: Tensor
    p_value: Tensor
    inflation: Tensor


def paired_difference(a: Tensor, b: Tensor, *, level: float = 0.95) -> PairedDifference:
    """Test the mean of ``a - b`` by Student's t, widened for autocorrelation.

    The standard error is multiplied by the factor of a second-order autoregressive process with
    the first two autocorrelations of the differences (Geer 2016).

    Args:
        a: (T, ...) scores of one method at successive initial times.
        b: (T, ...) scores of the other at the same times.
        level: Coverage of the interval.

    Raises:
        ValueError: The shapes differ, or there are fewer than four times.
    """
    if a.shape != b.shape or len(a) < 4:
        raise ValueError(
            f"expected pairs of at least four scores, found {tuple(a.shape)} and {tuple(b.shape)}"
        )
    difference = (a - b).double()
    count = len(difference)
    mean = difference.mean(0)
    inflation = _autocorrelation_factor(difference - mean)
    error = difference.std(0) / count**0.5 * inflation
    quantile = float(stdtrit(count - 1, 0.5 + level / 2))
    t = torch.where(mean == 0, 0.0, mean.abs() / error)
    p_value = 2 * torch.as_tensor(stdtr(count - 1, -t.numpy()))
    return PairedDifference(
        mean, mean - quantile * error, mean + quantile * error, p_value, inflation
    )


def _autocorrelation_factor(anomalies: Tensor) -> Tensor:
    """Return sqrt((1 - r1 f1 - r2 f2) / (1 - f1 - f2)**2), at least 1 (Geer 2016, equation 20)."""
    variance = anomalies.square().sum(0)
    r1, r2 = (
        torch.where(variance > 0, (anomalies[lag:] * anomalies[:-lag]).sum(0) / variance, 0.0)
        for lag in (1, 2)
    )
    f1 = r1 * (1 - r2) / (1 - r1.square())
    f2 = (r2 - r1.square()) / (1 - r1.square())
    factor = (1 - r1 * f1 - r2 * f2) / (1 - f1 - f2).square()
    return factor.clamp(min=1.0).sqrt()
