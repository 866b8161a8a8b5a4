"""Grids by the names that stores of WeatherBench 2 carry."""

import re
from typing import NamedTuple

from core_gates.errors import GatesError
from weather.grid import Grid, gaussian_grid, regular_grid
from weather.regrid import Method

NAME = re.compile(
    r"(?P<columns>[1-9]\d*)x(?P<rows>[1-9]\d*)(_(?P<kind>equiangular|gaussian))?"
    r"(?P<poles>_with_poles)?(_(?P<method>conservative|bilinear))?"
)
EXAMPLES = "64x32_equiangular_conservative, 240x121_equiangular_with_poles, 64x32_gaussian"


class NamedGrid(NamedTuple):
    """A grid, and the method of regridding that its name states.

    Attributes:
        grid: Rows from north to south, columns from 0 eastwards.
        method: None where the name does not state one.
    """

    grid: Grid
    method: Method | None


def named_grid(name: str) -> NamedGrid | None:
    """Return the grid of a name such as ``240x121_equiangular_with_poles_conservative``.

    Columns come first. An equiangular grid has rows on the poles if the name has ``_with_poles``,
    or if it lacks ``equiangular`` and the number of rows is odd: ``1440x721`` has them, ``64x32``
    not.

    Args:
        name: Any text.

    Returns:
        None if the text is not the name of a grid.

    Raises:
        GatesError: The text is the name of a grid that does not exist.
    """
    found = NAME.fullmatch(name)
    if found is None:
        return None
    rows, columns = int(found["rows"]), int(found["columns"])
    poles = bool(found["poles"])
    if found["kind"] == "gaussian":
        if poles:
            raise GatesError(f"{name}: a Gaussian grid has no rows on the poles: drop _with_poles")
        grid = gaussian_grid(rows, columns)
    else:
        poles = poles or (found["kind"] is None and rows % 2 == 1)
        try:
            grid = regular_grid(rows, columns, poles=poles)
        except ValueError as error:
            raise GatesError(f"{name} is no grid ({error}), expected such as {EXAMPLES}") from error
    return NamedGrid(grid, found["method"])  # type: ignore[arg-type]
