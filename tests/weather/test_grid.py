"""Grids: cells, area weights against WeatherBench 2, distances."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from weather.grid import Grid, gaussian_grid, gaussian_nodes, great_circle_km, regular_grid

GOLDEN = Path(__file__).parents[1] / "golden" / "weather"


@pytest.mark.parametrize("name", ["wb2_asc_with_poles", "wb2_desc_no_poles"])
def test_area_weights_equal_weatherbench(name):
    with np.load(GOLDEN / f"{name}.npz") as golden:
        grid = Grid(torch.tensor(golden["latitude"]), torch.tensor(golden["longitude"]))
        expected = torch.tensor(golden["wb2_lat_weights_for_given_order"])
    assert_close(grid.area_weights(), expected, rtol=1e-12, atol=0)


def test_weights_are_areas_whatever_the_order_of_rows():
    grid = regular_grid(19, 36, poles=True)
    flipped = Grid(grid.latitude.flip(0), grid.longitude)
    assert_close(flipped.area_weights().flip(0), grid.area_weights())
    assert_close(grid.area_weights().mean().item(), 1.0)
    cap = 1 - math.sin(math.radians(85))  # area of the polar row over 2 pi
    assert_close(grid.area_weights()[0].item(), cap / (2 / 19))


def test_area_mean_of_zonal_fields():
    grid = regular_grid(181, 4, poles=True)
    sine = grid.latitude.deg2rad().sin()[:, None].expand(grid.shape)
    assert grid.area_mean(sine.square()).item() == pytest.approx(1 / 3, abs=1e-4)
    assert grid.area_mean(torch.full((2, *grid.shape), 3.0)).tolist() == pytest.approx([3.0, 3.0])
    with pytest.raises(ValueError, match="181"):
        grid.area_mean(torch.zeros(4, 181))


def test_grids_run_from_north_to_south_and_from_zero_eastwards():
    for grid in (gaussian_grid(32, 64), regular_grid(32, 64, poles=False)):
        assert grid.shape == (32, 64)
        assert (grid.latitude.diff() < 0).all()
        assert grid.longitude[0] == 0
        assert grid.longitude[1] == 5.625
        assert_close(grid.latitude, -grid.latitude.flip(0), atol=1e-12, rtol=0)
    assert regular_grid(32, 64, poles=False).latitude[0] == 90 - 90 / 32
    assert regular_grid(33, 64, poles=True).latitude[[0, -1]].tolist() == [90, -90]
    assert gaussian_grid(32, 64).latitude[0].item() == pytest.approx(85.7605871, abs=1e-6)


def test_gaussian_quadrature_is_exact_for_polynomials():
    nodes, weights = gaussian_nodes(8)
    for degree in range(16):
        exact = 0 if degree % 2 else 2 / (degree + 1)
        assert (weights * nodes**degree).sum().item() == pytest.approx(exact, abs=1e-14)


def test_bounds_cover_the_sphere_once():
    grid = Grid(torch.tensor([-60.0, 0.0, 80.0]), torch.tensor([-180.0, -90.0, 0.0, 100.0]))
    assert grid.latitude_bounds().tolist() == [-90, -30, 40, 90]
    assert grid.longitude_bounds().tolist() == [-220, -135, -45, 50, 140]


def test_distances():
    degrees = torch.tensor([[0.0, 0, 0, 90], [0, 0, 90, 37], [60, 10, 60, 190], [50, 8, 50, 8]])
    expected = 6371 * torch.tensor([math.pi / 2, math.pi / 2, math.pi / 3, 0])
    assert_close(great_circle_km(*degrees.double().T), expected.double(), atol=1e-3, rtol=1e-6)
    antipode = great_circle_km(*torch.tensor([30.0, 10, -30, 190]).double())
    assert antipode.item() == pytest.approx(6371 * math.pi)


def test_equal_grids_compare_and_hash_equal():
    assert gaussian_grid(4, 8) == gaussian_grid(4, 8)
    assert len({gaussian_grid(4, 8), gaussian_grid(4, 8), regular_grid(4, 8, poles=True)}) == 2
    assert gaussian_grid(4, 8) != "grid"


@pytest.mark.parametrize(
    ("latitude", "longitude", "message"),
    [
        ([0.0, 10.0, 5.0], [0.0, 90.0], "rise or fall"),
        ([0.0, 95.0], [0.0, 90.0], "-90, 90"),
        ([0.0, 10.0], [0.0, 90.0, 360.0], "repeated meridian"),
        ([0.0, 10.0], [180.0, -180.0], "increase"),
        ([0.0, float("nan")], [0.0], "finite"),
        ([], [0.0], "finite"),
    ],
)
def test_bad_coordinates_are_refused(latitude, longitude, message):
    with pytest.raises(ValueError, match=message):
        Grid(torch.tensor(latitude), torch.tensor(longitude))


def test_the_difference_of_grids():
    grid = gaussian_grid(16, 32)
    rounded = Grid(grid.latitude.float(), grid.longitude.float())
    assert grid != rounded
    assert 0 < grid.difference(rounded) < 1e-5
    assert grid.difference(Grid(grid.latitude, grid.longitude + 0.25)) == 0.25
    assert grid.difference(Grid(grid.latitude - 0.5, grid.longitude)) == 0.5
    assert grid.difference(gaussian_grid(16, 16)) == math.inf
