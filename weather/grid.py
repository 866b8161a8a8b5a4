"""Latitude-longitude grids: cells, areas, distances, and regridding between them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from core_gates.errors import GatesError

EARTH_RADIUS_KM = 6371.0


@dataclass(frozen=True, eq=False)
class Grid:
    """A global grid that is the product of latitude rows and longitude columns.

    Args:
        latitude: Row centers (H,), degrees, strictly ascending or strictly descending.
        longitude: Column centers (W,), degrees, strictly increasing eastwards, less than one turn.

    Raises:
        ValueError: A coordinate is empty, not finite, out of range, or not monotonic.
    """

    latitude: Tensor
    longitude: Tensor

    def __post_init__(self) -> None:
        for name in ("latitude", "longitude"):
            values = torch.as_tensor(getattr(self, name)).detach().to("cpu", torch.float64)
            object.__setattr__(self, name, values)
            if values.ndim != 1 or len(values) == 0 or not values.isfinite().all():
                raise ValueError(
                    f"{name} must be a vector of finite degrees, found shape {tuple(values.shape)}"
                )
        steps = self.latitude.diff()
        if self.latitude.abs().max() > 90 or not ((steps > 0).all() or (steps < 0).all()):
            raise ValueError(
                "latitude must lie within [-90, 90] and rise or fall strictly, found "
                f"{_summary(self.latitude)}: sort it"
            )
        turn = self.longitude[-1] - self.longitude[0]
        if not (self.longitude.diff() > 0).all() or turn >= 360:
            raise ValueError(
                "longitude must increase strictly over less than 360 degrees, found "
                f"{_summary(self.longitude)}: roll it and drop the repeated meridian"
            )

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Grid)
            and torch.equal(self.latitude, other.latitude)
            and torch.equal(self.longitude, other.longitude)
        )

    def difference(self, other: Grid) -> float:
        """Return the largest difference of two coordinates, degrees; infinite for other shapes."""
        if self.shape != other.shape:
            return math.inf
        return max(
            float((self.latitude - other.latitude).abs().max()),
            float((self.longitude - other.longitude).abs().max()),
        )

    def __hash__(self) -> int:
        return hash((tuple(self.latitude.tolist()), tuple(self.longitude.tolist())))

    def __repr__(self) -> str:
        return f"Grid(latitude={_summary(self.latitude)}, longitude={_summary(self.longitude)})"

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W)."""
        return len(self.latitude), len(self.longitude)

    def latitude_bounds(self) -> Tensor:
        """Return the edges of the rows (H+1,), degrees: midpoints, and the poles at the ends.

        They run in the order of ``latitude``.
        """
        middle = (self.latitude[1:] + self.latitude[:-1]) / 2
        ascending = len(self.latitude) > 1 and bool(self.latitude[1] > self.latitude[0])
        first = middle.new_tensor([-90.0 if ascending else 90.0])
        return torch.cat((first, middle, -first))

    def longitude_bounds(self) -> Tensor:
        """Return the edges of the columns (W+1,), degrees; the last is the first plus 360."""
        wrapped = torch.cat((self.longitude[-1:] - 360.0, self.longitude))
        west = (wrapped[1:] + wrapped[:-1]) / 2
        return torch.cat((west, west[:1] + 360.0))

    def area_weights(self) -> Tensor:
        """Return the area of a cell of each row (H,), float64, mean 1 (WeatherBench 2)."""
        area = self.latitude_bounds().deg2rad().sin().diff().abs()
        return area / area.mean()

    def area_mean(self, field: Tensor) -> Tensor:
        """Average ``(..., H, W)`` over the sphere with the area weights.

        Raises:
            ValueError: The field is not on this grid.
        """
        if tuple(field.shape[-2:]) != self.shape:
            raise ValueError(f"expected (..., H, W) on {self.shape}, found {tuple(field.shape)}")
        field = at_least_single(field)
        return (field.mean(-1) * self.area_weights().to(field)).mean(-1)


def at_least_single(field: Tensor) -> Tensor:
    """Return a field in its own type, or in float32 if that is half precision or whole numbers."""
    return field.to(torch.promote_types(field.dtype, torch.float32))


def gaussian_nodes(count: int) -> tuple[Tensor, Tensor]:
    """Return sines of Gaussian latitudes, north to south, and their quadrature weights (sum 2)."""
    if count < 1:
        raise ValueError(f"a Gaussian grid needs at least one latitude, got {count}")
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return torch.from_numpy(nodes[::-1].copy()), torch.from_numpy(weights[::-1].copy())


def gaussian_grid(num_latitudes: int, num_longitudes: int) -> Grid:
    """Return the grid of Gaussian latitudes, north to south, and longitudes from 0 eastwards."""
    sines, _ = gaussian_nodes(num_latitudes)
    return Grid(sines.asin().rad2deg(), _longitudes(num_longitudes))


def regular_grid(num_latitudes: int, num_longitudes: int, *, poles: bool) -> Grid:
    """Return equidistant latitudes, north to south, and longitudes from 0 eastwards.

    Args:
        num_latitudes: Rows H.
        num_longitudes: Columns W.
        poles: Whether the first and last rows lie on the poles; otherwise half a row off.

    Raises:
        ValueError: There are fewer rows or columns than such a grid needs.
    """
    if num_latitudes < (2 if poles else 1):
        raise ValueError(f"num_latitudes={num_latitudes} is too small for poles={poles}")
    edge = 90.0 if poles else 90.0 - 90.0 / num_latitudes
    return Grid(
        torch.linspace(edge, -edge, num_latitudes, dtype=torch.float64), _longitudes(num_longitudes)
    )


def great_circle_km(lat1: Tensor, lon1: Tensor, lat2: Tensor, lon2: Tensor) -> Tensor:
    """Return the distance on the sphere, km, by the haversine formula.

    Args:
        lat1: Latitude of the first point, degrees; the arguments broadcast.
        lon1: Longitude of the first point, degrees.
        lat2: Latitude of the second point, degrees.
        lon2: Longitude of the second point, degrees.
    """
    half_lat = (lat2 - lat1).deg2rad() / 2
    half_lon = (lon2 - lon1).deg2rad() / 2
    cosines = lat1.deg2rad().cos() * lat2.deg2rad().cos()
    haversine = half_lat.sin().square() + cosines * half_lon.sin().square()
    return 2 * EARTH_RADIUS_KM * haversine.clamp(0, 1).sqrt().asin()


def _longitudes(count: int) -> Tensor:
    if count < 1:
        raise ValueError(f"a grid needs at least one longitude, got {count}")
    return torch.arange(count, dtype=torch.float64) * (360.0 / count)


def _summary(values: Tensor) -> str:
    return f"{len(values)} values {values[0].item():g}..{values[-1].item():g}"


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
            rows, columns = (weights / weights.sum(1, keepdim=True) for weights in (rows, columns))
        elif method == "bilinear":
            rows = _linear(source.latitude, target.latitude)
            columns = _periodic_linear(source.longitude, target.longitude)
        else:
            raise ValueError(f"method must be 'conservative' or 'bilinear', got {method!r}")
        self.source, self.target, self.method = source, target, method
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)
        import scipy.sparse  # only regridding waits for it

        self._sparse: list[Any] = [
            scipy.sparse.csr_array(weights.numpy()) for weights in (rows, columns)
        ]

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
        result = np.empty((*field.shape[:-2], *self.target.shape), layers.dtype)
        for index in np.ndindex(*field.shape[:-2]):
            result[index] = (columns @ (rows @ layers[index]).T).T
        return torch.from_numpy(result).to(field.dtype)


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
    match = NAME.fullmatch(name)
    if match is None:
        return None
    rows, columns = int(match["rows"]), int(match["columns"])
    poles = bool(match["poles"])
    if match["kind"] == "gaussian":
        if poles:
            raise GatesError(f"{name}: a Gaussian grid has no rows on the poles: drop _with_poles")
        grid = gaussian_grid(rows, columns)
    else:
        poles = poles or (match["kind"] is None and rows % 2 == 1)
        try:
            grid = regular_grid(rows, columns, poles=poles)
        except ValueError as error:
            raise GatesError(f"{name} is no grid ({error}), expected such as {EXAMPLES}") from error
    return NamedGrid(grid, match["method"])  # type: ignore[arg-type]
