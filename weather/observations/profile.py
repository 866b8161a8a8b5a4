"""Bringing profiles, such as those of radiosondes, to the levels of a state."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from weather.observations.table import ObservationTable

SCALE_HEIGHTS = 1.0  # widest gap that is bridged, in ln(pressure)


def interpolate_profiles(
    table: ObservationTable, levels: Sequence[int], *, max_gap: float = SCALE_HEIGHTS
) -> ObservationTable:
    """Interpolate every profile linearly in ln(pressure) to the given levels.

    A profile is what one station reports of one variable at one time at two or more pressures. A
    level is filled if reports lie on both sides less than ``max_gap`` scale heights apart, or if
    a report lies on it; nothing is extrapolated. The error is interpolated like the value: errors
    of neighboring reports of one instrument are taken as fully correlated. Rows outside of
    profiles, and rows with a quality flag, stay as they are.

    Args:
        table: Observations.
        levels: Pressures in hPa.
        max_gap: Widest distance of the two reports in ln(pressure).
    """
    frame = table.frame
    usable = frame["level_hpa"].notna() & (frame["qc"] == 0)
    keys = ["station", "source", "variable", "time", "latitude", "longitude"]
    size = frame[usable].groupby(keys)["value"].transform("size")
    in_profile = usable & (size.reindex(frame.index, fill_value=1) > 1)
    parts = [frame[~in_profile]]
    for _, profile in frame[in_profile].groupby(keys, sort=False):
        parts.append(_at_levels(profile, np.asarray(levels, dtype=np.float64), max_gap))
    return ObservationTable.from_frame(pd.concat(parts, ignore_index=True))


def _at_levels(profile: pd.DataFrame, levels: np.ndarray, max_gap: float) -> pd.DataFrame:
    profile = profile.groupby("level_hpa", as_index=False).first().sort_values("level_hpa")
    reported = np.log(profile["level_hpa"].to_numpy())
    wanted = np.log(levels)
    above = np.searchsorted(reported, wanted, side="right") - 1
    below = np.searchsorted(reported, wanted, side="left")
    bracketed = (above >= 0) & (below < len(reported))
    above, below = above[bracketed], below[bracketed]
    bridged = reported[below] - reported[above] < max_gap
    targets = levels[bracketed][bridged]
    rows = profile.iloc[np.zeros(len(targets), dtype=int)].assign(
        level_hpa=targets, height_m=np.nan
    )
    for name in ("value", "error"):
        rows[name] = np.interp(np.log(targets), reported, profile[name].to_numpy())
    return rows
