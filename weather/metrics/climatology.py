"""Which field of a climatology belongs to which time."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def climatology_at(
    climatology: Tensor, times: np.ndarray, *, hours: Sequence[int] = (0, 6, 12, 18)
) -> Tensor:
    """Pick the climatology by hour and day of the year (WeatherBench 2).

    Args:
        climatology: (len(hours), 366, ...), days counted from 1 January; day 366 only in leap
            years.
        times: (T,) of type datetime64.
        hours: Hours of the first dimension.

    Returns:
        (T, ...).

    Raises:
        ValueError: The climatology has another layout or lacks the hour of a time.
    """
    if tuple(climatology.shape[:2]) != (len(hours), 366):
        raise ValueError(
            f"expected a climatology ({len(hours)}, 366, ...), found {tuple(climatology.shape)}"
        )
    days = times.astype("datetime64[D]")
    day_index = (days - times.astype("datetime64[Y]").astype("datetime64[D]")).astype(int)
    hour = (times.astype("datetime64[h]") - days.astype("datetime64[h]")).astype(int)
    missing = sorted(set(hour.tolist()) - set(hours))
    if missing:
        raise ValueError(f"the climatology has the hours {tuple(hours)}, not {missing}")
    hour_index = torch.tensor([tuple(hours).index(value) for value in hour.tolist()])
    return climatology[hour_index, torch.from_numpy(day_index)]
