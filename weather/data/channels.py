"""Which channels a store offers."""

from __future__ import annotations

import os
from collections.abc import Sequence

from core_gates.errors import GatesError
from weather.data.axes import level_positions, rename_axes
from weather.data.store import naming, open_store
from weather.state import SHORT_NAMES, ChannelSpec
from weather.variables import VARIABLES

LONG_NAMES = {short: name for name, short in SHORT_NAMES.items()}


def store_channels(
    source: str | os.PathLike[str], variables: Sequence[str] = (), levels: Sequence[int] = ()
) -> ChannelSpec:
    """Return the channels of a store: variables with a time, and their levels.

    Args:
        source: Path or URL of a store in the schema of WeatherBench 2.
        variables: Names of WeatherBench 2; those whose unit is known (`weather.variables`) if
            empty.
        levels: hPa; all of the store if empty.

    Raises:
        GatesError: A variable or a level is missing, or no known variable is there.
    """
    with open_store(source) as raw, naming(source):
        dataset = rename_axes(raw)
        fields = {
            LONG_NAMES.get(str(name), str(name)): array.dims
            for name, array in dataset.data_vars.items()
            if {"time", "latitude", "longitude"} <= set(array.dims)
        }
        found = ", ".join(sorted(fields)) or "none"
        if missing := [name for name in variables if name not in fields]:
            raise GatesError(
                f"variable {', '.join(missing)} is missing, found {found}; choose variables that "
                "exist"
            )
        wanted = list(variables) or [name for name in VARIABLES if name in fields]
        if not wanted:
            raise GatesError(
                f"holds no variable of {', '.join(VARIABLES)}, found {found}; name the variables "
                "(time, latitude, longitude) that are to be analyzed"
            )
        surface = tuple(name for name in wanted if "level" not in fields[name])
        upper = tuple(name for name in wanted if "level" in fields[name])
        if upper and "level" not in dataset.coords:
            raise GatesError("dimension level has no values; write its coordinate")
        known = sorted(dataset["level"].values.tolist()) if upper else []
        if upper and levels:
            level_positions(dataset, levels)
        return ChannelSpec(surface, upper, tuple(levels or known) if upper else ())
