"""The error of a background, judged by its own departures from the observations."""

import torch
from torch import Tensor

from weather.observations.gridded import GriddedObservations

ITERATIONS = 6
SMALLEST, LARGEST = 0.02, 10.0  # of the first guess


def innovation_sd(background: Tensor, observations: GriddedObservations, first: Tensor) -> Tensor:
    """Scale a first guess of the background error standard deviations to fit the innovations.

    In units of the first guess, the innovations ``d`` of unbiased, independent errors have the
    variance ``r**2 + errors**2``. The common factor of all channels solves
    ``r**2 = sum w (d**2 - errors**2) / sum w`` with the weights of maximum likelihood,
    ``w = (r**2 + errors**2)**-2``, by a few fixed-point steps from 1.

    Args:
        background: (B,C,H,W).
        observations: Fields (B,C,H,W) in the same units.
        first: (B,C) or (C,) first guess, which is kept where nothing is observed. The factor
            stays between 0.02 and 10.

    Returns:
        (B,C), without gradient.
    """
    with torch.no_grad():
        first = first.to(background).expand(background.shape[:2])
        unit = first[..., None, None]
        innovations = torch.where(observations.mask, observations.values - background, 0)
        square = (innovations / unit).square()
        noise = (observations.errors.to(background) / unit).square()
        factor = torch.ones_like(square[:, :1, :1, :1])
        for _ in range(ITERATIONS):
            weight = (factor + noise).pow(-2)  # 0 where nothing is observed
            excess = torch.where(observations.mask, weight * (square - noise), 0)
            total = weight.sum((1, 2, 3), keepdim=True)
            fit = excess.sum((1, 2, 3), keepdim=True) / total
            factor = torch.where(total > 0, fit, factor).clamp(SMALLEST**2, LARGEST**2)
        return first * factor.sqrt().flatten(1)
