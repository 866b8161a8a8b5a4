"""``gates weather regrid``: a store on another grid."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Literal

from core_gates.errors import GatesError
from harness.files import require_apart, require_free
from harness.runs.environment import made_by
from harness.runs.ticker import ticking
from weather.grid import Grid
from weather.grid_names import EXAMPLES, named_grid
from weather.operations.regridding import Missing, read_grid, regrid_store
from weather.regrid import Method


def regrid(
    source: str,
    target_grid: str,
    output: str,
    method: Literal["conservative", "bilinear"] | None = None,
    missing: Missing = "propagate",
    overwrite_output: bool = False,
) -> None:
    """Write all fields of the store SOURCE on TARGET_GRID into the store OUTPUT.

    SOURCE is a store as WeatherBench 2 has them, Zarr or NetCDF, with dimensions in any order and
    direction. TARGET_GRID is a name, columns first, such as 240x121_equiangular_with_poles or
    64x32_gaussian, or a store whose grid is taken. Fields are read and written block by block; a
    call that is killed is continued by the same call. Attributes, levels and times are kept.

    Args:
        source: Filled in by the command line.
        target_grid: Filled in by the command line.
        output: Filled in by the command line.
        method: ``conservative`` averages over the overlaps of cells and keeps the mean over the
            area, ``bilinear`` interpolates; that of the name of the grid if null, else
            conservative.
        missing: ``propagate`` makes NaN of every point to which a missing value contributes,
            ``refuse`` stops there.
        overwrite_output: Replace the store if it exists.
    """
    path = Path(output)
    require_free(path, overwrite=overwrite_output)
    if "://" not in source:
        require_apart(path, [Path(source)], "OUTPUT")
    grid, stated = _target(target_grid)
    if None not in (method, stated) and method != stated:
        raise GatesError(
            f"--method {method} contradicts the grid {target_grid}, leave one of the two out"
        )
    found = regrid_store(
        source,
        grid,
        path,
        method=method or stated or "conservative",
        missing=missing,
        attributes=made_by(),
        overwrite=overwrite_output,
        progress=ticking,
    )
    for name, (before, after) in found.missing.items():
        print(f"{name}: {100 * before:.3g} % of the values are missing, {100 * after:.3g} % now")
    if found.left_out:
        print(f"left out, since they have no longitude or no latitude: {', '.join(found.left_out)}")
    print(found.path)


def _target(text: str) -> tuple[Grid, Method | None]:
    """Return a grid by its name or of a store, and the method that the name states."""
    named = named_grid(text)
    if named is not None:
        return named
    if "://" not in text and not Path(text).exists():
        known = [*EXAMPLES.split(", "), *map(str, Path().glob("*.zarr"))]
        close = difflib.get_close_matches(text, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"give such as {EXAMPLES}"
        raise GatesError(f"{text!r} is neither the name of a grid nor a store: {hint}")
    return read_grid(text), None
