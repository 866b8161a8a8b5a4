"""Regridding between latitude-longitude grids, conservative or bilinear, and grids by name."""

import re
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.sparse
import torch
from torch import Tensor, nn

from core_gates.errors import GatesError
from weather.grid import Grid, gaussian_grid, regular_grid

Method = Literal["conservative", "bilinear"]

NEGLIGIBLE = 1e-6
"""Fraction of a target cell below which a source cell is only a rounding of the edges."""


class Regridder(nn.Module):
    """Map fields from one grid to another with weights that are computed once.

    Both methods are products of one matrix in latitude and one in longitude, with rows that sum
    to 1. ``conservative`` averages over the overlaps of cells (first order: cells are constant; a
    cell of row i and column j covers an interval of sin(latitude) times one of longitude) and
    keeps the area mean. ``bilinear`` interpolates linearly in degrees, around the globe in
    longitude; beyond the outermost rows it takes the outermost row.

    A value that is not finite makes NaN of the target points to which it contributes, and of no
    others. On the CPU, without gradients, the matrices are sparse and sums are formed in float64,
    so that a field in float32 keeps its mean; elsewhere they are dense, in the dtype of the field.

    Args:
        source: Grid of the input (H, W).
        target: Grid of the output (H', W').
        method: "conservative" or "bilinear".

    Raises:
        ValueError: The method is unknown.
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, source: Grid, target: Grid, method: Method = "conservative") -> None:
        super().__init__()
        if method == "conservative":
            rows = _overlaps(
                source.latitude_bounds().deg2rad().sin(), target.latitude_bounds().deg2rad().sin()
            )
            ours, theirs = source.longitude_bounds(), target.longitude_bounds()
            turns = torch.arange(-3, 4) * 360.0
            columns = torch.stack([_overlaps(ours + turn, theirs) for turn in turns]).sum(0)
            rows, columns = (one / one.sum(1, keepdim=True) for one in (rows, columns))
        elif method == "bilinear":
            rows = _linear(source.latitude, target.latitude)
            columns = _periodic_linear(source.longitude, target.longitude)
        else:
            raise ValueError(f"method must be 'conservative' or 'bilinear', got {method!r}")
        self.source, self.target, self.method = source, target, method
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)
        self._sparse: list[Any] = [scipy.sparse.csr_array(one.numpy()) for one in (rows, columns)]

    def forward(self, field: Tensor) -> Tensor:
        """Return the field ``(..., H, W)`` on the target grid ``(..., H', W')``, in its dtype.

        Raises:
            ValueError: The field is not on the source grid.
        """
        if tuple(field.shape[-2:]) != self.source.shape:
            raise ValueError(
                f"expected (..., H, W) on {self.source.shape}, found {tuple(field.shape)}"
            )
        regridded = self._weighted(field)
        if regridded.isfinite().all():  # what is not finite stays so in every sum
            return regridded
        missing = ~field.isfinite()
        spoiled = self._weighted(missing.to(regridded)) > NEGLIGIBLE
        return self._weighted(field.masked_fill(missing, 0)).masked_fill(spoiled, torch.nan)

    def _weighted(self, field: Tensor) -> Tensor:
        """Return the weighted sums, of which none passes over a value that is not finite."""
        if field.device.type != "cpu" or field.requires_grad:
            return self.rows.to(field) @ (field @ self.columns.to(field).T)
        rows, columns = self._sparse
        plain = field.detach()
        layers = plain.to(torch.promote_types(plain.dtype, torch.float32)).numpy()
        found = np.empty((*field.shape[:-2], *self.target.shape), layers.dtype)
        for index in np.ndindex(*field.shape[:-2]):
            found[index] = (columns @ (rows @ layers[index]).T).T
        return torch.from_numpy(found).to(field.dtype)


def _overlaps(source: Tensor, target: Tensor) -> Tensor:
    """Return the lengths shared by intervals with the given ends: (target, source)."""
    low_S, high_S = torch.stack((source[:-1], source[1:])).sort(0).values
    low_T, high_T = torch.stack((target[:-1], target[1:])).sort(0).values
    shared = torch.minimum(high_T[:, None], high_S) - torch.maximum(low_T[:, None], low_S)
    return shared.clamp(min=0)


def _linear(source: Tensor, target: Tensor) -> Tensor:
    """Return the weights (target, source) of linear interpolation, constant beyond the ends."""
    order = source.argsort()
    points = source[order]
    if len(points) == 1:
        return torch.ones(len(target), 1, dtype=torch.float64)
    place = target.clamp(points[0], points[-1])
    right = torch.searchsorted(points, place).clamp(1, len(points) - 1)
    share = (place - points[right - 1]) / (points[right] - points[right - 1])
    weights = torch.zeros(len(target), len(points), dtype=torch.float64)
    index = torch.arange(len(target))
    weights[index, order[right - 1]] = 1 - share
    weights[index, order[right]] += share
    return weights


def _periodic_linear(source: Tensor, target: Tensor) -> Tensor:
    """Return the weights (target, source) of linear interpolation around the globe."""
    west = source[0]
    around = torch.cat((source, west[None] + 360.0))
    weights = _linear(around, west + (target - west).remainder(360.0))
    weights[:, 0] += weights[:, -1]
    return weights[:, :-1]


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
