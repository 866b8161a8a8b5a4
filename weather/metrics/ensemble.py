"""Scores of ensembles, unbiased by the ensemble size (WeatherBench 2 and WeatherBench-X).

Ensembles are (M, ..., H, W) with the members first, the truth is (..., H, W); ``weights`` are (H,)
or (H, W), see `weather.metrics.regions.spatial_mean`. Scores are (...,): average them over time
before a ratio or a root is taken of them.
"""

import torch
from torch import Tensor

from weather.grid import at_least_single
from weather.metrics.regions import spatial_mean


def crps_skill(ensemble: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    """Return the mean absolute error of the members, the first term of the CRPS."""
    return spatial_mean((at_least_single(ensemble) - at_least_single(truth)).abs().mean(0), weights)


def crps_spread(ensemble: Tensor, weights: Tensor) -> Tensor:
    """Return the mean absolute difference of two different members; half of it enters the CRPS."""
    members = _count(ensemble)
    ensemble = at_least_single(ensemble)
    # Sorted, each member exceeds `rank` others, so the sum over pairs costs M log M. The factors
    # add up to zero: taking out the mean changes nothing but the rounding.
    rank = torch.arange(members, dtype=ensemble.dtype, device=ensemble.device)
    factor = (2 * rank - members + 1).view(-1, *[1] * (ensemble.ndim - 1))
    ordered = (ensemble - ensemble.mean(0)).sort(0).values
    total = (ordered * factor).sum(0)
    return spatial_mean(2 * total / (members * (members - 1)), weights)


def crps(ensemble: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    """Return the fair continuous ranked probability score (Ferro 2014)."""
    return crps_skill(ensemble, truth, weights) - crps_spread(ensemble, weights) / 2


def ensemble_variance(ensemble: Tensor, weights: Tensor) -> Tensor:
    """Return the mean unbiased variance of the members."""
    _count(ensemble)
    return spatial_mean(at_least_single(ensemble).var(0), weights)


def ensemble_mean_mse(ensemble: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    """Return the mean square error of the ensemble mean."""
    mean = at_least_single(ensemble).mean(0)
    return spatial_mean((mean - at_least_single(truth)).square(), weights)


def unbiased_mean_mse(ensemble: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    """Return the mean square error that the mean of infinitely many members would have.

    It is the error of the mean minus variance / M, and may be negative by chance.
    """
    members = _count(ensemble)
    variance = ensemble_variance(ensemble, weights)
    return ensemble_mean_mse(ensemble, truth, weights) - variance / members


def unbiased_mean_rmse(ensemble: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    """Return the root of `unbiased_mean_mse` averaged over time; NaN where that is negative.

    Args:
        ensemble: (M, T, ..., H, W).
        truth: (T, ..., H, W).
        weights: Of the rows or cells.
    """
    return unbiased_mean_mse(ensemble, truth, weights).mean(0).sqrt()


def spread_skill_ratio(ensemble: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    """Return the spread over the unbiased error of the mean, 1 for a reliable ensemble.

    Args:
        ensemble: (M, T, ..., H, W).
        truth: (T, ..., H, W).
        weights: Of the rows or cells.

    Returns:
        (...,); NaN where the unbiased mean square error is negative.
    """
    variance = ensemble_variance(ensemble, weights).mean(0)
    return variance.sqrt() / unbiased_mean_rmse(ensemble, truth, weights)


def rank_histogram(ensemble: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    """Return the fraction (M+1, ...) of the area where the truth exceeds 0, 1, ... M members.

    A truth that equals some members counts in equal parts for all ranks that it may have. Where the
    truth or a member is NaN, the fractions of that field are NaN, as every other score of it is.
    """
    ensemble, truth = at_least_single(ensemble), at_least_single(truth)
    known = ~(truth.isnan() | ensemble.isnan().any(0))
    below = (ensemble < truth).sum(0)
    upto = (ensemble <= truth).sum(0)
    width = torch.where(known, upto - below + 1, torch.nan).to(ensemble)
    shares = [
        spatial_mean(((below <= rank) & (rank <= upto)) / width, weights)
        for rank in range(len(ensemble) + 1)
    ]
    return torch.stack(shares)


def _count(ensemble: Tensor) -> int:
    if len(ensemble) < 2:
        raise ValueError(f"this score needs at least two members, found {len(ensemble)}")
    return len(ensemble)
