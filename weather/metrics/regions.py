"""Area averages, as WeatherBench 2 defines them."""

import torch
from torch import Tensor

from weather.grid import at_least_single


def spatial_mean(field: Tensor, weights: Tensor) -> Tensor:
    """Average over latitude and longitude.

    Args:
        field: (..., H, W).
        weights: (H,) for each row, as `Grid.area_weights`, or (H, W). Values where the weight is
            zero do not matter, not even NaN.

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
