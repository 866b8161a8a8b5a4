"""Latitude-longitude grids: coordinates, cells, area weights and distances."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

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
