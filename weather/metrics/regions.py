"""Area averages over the globe and over regions, as WeatherBench 2 defines them."""

import torch
from torch import Tensor

from weather.grid import Grid, at_least_single

REGIONS = ("global", "tropics", "extratropics", "northern", "southern", "europe")
"""Regions that `region_weights` knows: |lat| <= 20, |lat| >= 20, lat >= 20, lat <= -20, Europe."""


def spatial_mean(field: Tensor, weights: Tensor) -> Tensor:
    """Average over latitude and longitude.

    Args:
        field: (..., H, W).
        weights: (H,) for each row, as `Grid.area_weights`, or (H, W), as `region_weights`. Values
            where the weight is zero do not matter, not even NaN.

    Returns:
        (...,), in single precision at least: sums over a globe exceed half precision.

    Raises:
        ValueError: The weights do not fit the field.
    """
    field = at_least_single(field)
    if weights.ndim == 1:
        weights = weights[:, None].expand(-1, field.shape[-1])
    if weights.shape != field.shape[-2:]:
        raise ValueError(
            f"expected weights (H,) or (H, W) for a field {tuple(field.shape)}, found "
            f"{tuple(weights.shape)}"
        )
    weights = weights.to(field)
    weighted = torch.where(weights == 0, 0.0, field * weights)
    return weighted.sum((-2, -1)) / weights.sum()


def region_weights(grid: Grid, region: str) -> Tensor:
    """Return the area weights (H, W) of a region: those of the globe, zero outside.

    Europe is 35 to 75 degrees north and 347.5 to 42.5 degrees east; all bounds are inclusive.

    Raises:
        ValueError: The region is unknown or holds no grid point.
    """
    latitude, longitude = grid.latitude[:, None], grid.longitude % 360
    everywhere = torch.ones(grid.shape, dtype=torch.bool)
    inside = {
        "global": everywhere,
        "tropics": everywhere & (latitude.abs() <= 20),
        "extratropics": everywhere & (latitude.abs() >= 20),
        "northern": everywhere & (latitude >= 20),
        "southern": everywhere & (latitude <= -20),
        "europe": (latitude >= 35)
        & (latitude <= 75)
        & ((longitude >= 347.5) | (longitude <= 42.5)),
    }
    if region not in inside:
        raise ValueError(f"region {region!r} is unknown, expected one of {', '.join(REGIONS)}")
    return mask_weights(grid, inside[region])


def mask_weights(grid: Grid, mask: Tensor) -> Tensor:
    """Return the area weights (H, W) where a boolean mask (H, W) is true, zero elsewhere.

    Raises:
        ValueError: The mask is off the grid or nowhere true.
    """
    if tuple(mask.shape) != grid.shape or not mask.any():
        raise ValueError(f"expected a mask {grid.shape} that is true somewhere")
    return grid.area_weights()[:, None] * mask
