"""What the package ships, and what it says where a package is missing."""

import subprocess
import sys
from importlib.resources import files

import numpy as np
import pytest
import torch

from weather.data.shipped import ATTRIBUTION, coastline, land_mask, land_rings, load_era5_sample
from weather.grid import Grid, gaussian_grid, regular_grid

SCRIPT = "import sys; sys.modules['xarray'] = None; import weather.data"


def test_missing_xarray_names_the_extra():
    finished = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False
    )
    last = finished.stderr.strip().splitlines()[-1]
    assert last.endswith("MissingExtraError: weather needs xarray: pip install '.[weather]'")


def test_layout():
    fields, grid, channels, times = load_era5_sample()
    assert fields.shape == (10, 4, 4, 61, 120)
    assert fields.dtype == torch.float32
    assert channels.labels == ("z850", "z500", "t850", "t500")
    assert grid.latitude[[0, 1, -1]].tolist() == [90, 87, -90]
    assert grid.longitude[[0, 1, -1]].tolist() == [0, 3, 357]
    expected = np.array(["2017-01-01T00", "2017-01-01T12", "2017-01-02T00", "2017-01-02T12"])
    np.testing.assert_array_equal(times, expected.astype("datetime64[ns]"))
    assert "Copernicus" in ATTRIBUTION


def test_units_and_level_order():
    fields, grid, _, _ = load_era5_sample()
    z850, z500, t850, t500 = (fields * grid.area_weights()[:, None]).mean((0, 1, 3, 4)).tolist()
    assert 13_500 < z850 < 15_000  # m2 s-2
    assert 54_000 < z500 < 57_000
    assert 275 < t850 < 285  # K
    assert 255 < t500 < 265
    assert fields.isfinite().all()


def test_fields_stand_the_right_way_up():
    """In January the Arctic is colder at 850 hPa than the Antarctic, Siberia than the Pacific."""
    fields, grid, channels, _ = load_era5_sample()
    t850 = fields[:, :, channels.index("temperature", 850)].mean((0, 1))
    north, south = grid.latitude > 60, grid.latitude < -60
    assert t850[north].mean() < t850[south].mean()
    row = int((grid.latitude - 60).abs().argmin())
    assert t850[row, grid.longitude == 120] < t850[row, grid.longitude == 180] - 5


def test_member_zero_is_the_control():
    """The unperturbed member lies nearer to the mean of the others (9.4 against 13.9 m2 s-2)."""
    fields, grid, channels, _ = load_era5_sample()
    z500 = fields[:, :, channels.index("geopotential", 500)]
    weights = grid.area_weights()[:, None]
    spreads = []
    for member in range(10):
        others = torch.cat((z500[:member], z500[member + 1 :])).mean(0)
        spreads.append(((z500[member] - others) ** 2 * weights).mean().sqrt().item())
    assert 8.5 < spreads[0] < 10.5
    assert min(spreads[1:]) > 1.25 * spreads[0]
    assert 13 < sum(spreads[1:]) / 9 < 16


LAND = {
    "Paris": (48.9, 2.4),
    "Moscow": (55.8, 37.6),
    "Brasilia": (-15.8, -47.9),
    "Alice Springs": (-23.7, 133.9),
    "Denver": (39.7, -105.0),
    "Nairobi": (-1.3, 36.8),
    "South Pole": (-90.0, 0.0),
    "Greenland": (72.0, -40.0),
    "Chukotka, east of 180": (66.5, -178.0),
    "Chukotka, west of 180": (67.0, 178.0),
    "border of Spain and Portugal": (39.0, -7.2),
}
SEA = {
    "North Pole": (90.0, 0.0),
    "Null Island": (0.0, 0.0),
    "Pacific": (0.0, -150.0),
    "Pacific at 180": (0.0, 180.0),
    "Gulf of Mexico": (25.0, -90.0),
    "Mediterranean": (35.0, 18.0),
    "Caspian": (42.0, 51.0),
    "Hudson Bay": (60.0, -86.0),
    "Tasman Sea": (-38.0, 160.0),
}


@pytest.mark.parametrize("place", {**LAND, **SEA})
@pytest.mark.parametrize("convention", [0, 360])
def test_places(place, convention):
    latitude, longitude = {**LAND, **SEA}[place]
    longitude = longitude % 360 if convention else longitude
    grid = Grid(torch.tensor([latitude]), torch.tensor([longitude]))
    assert land_mask(grid).item() == (place in LAND)


def test_land_covers_29_percent():
    grid = regular_grid(181, 360, poles=True)
    share = (land_mask(grid) * grid.area_weights()[:, None]).mean().item()
    assert share == pytest.approx(0.29, abs=0.01)


def test_mask_does_not_depend_on_the_orientation():
    grid = gaussian_grid(32, 64)
    mask = land_mask(grid)
    assert mask.shape == (32, 64)
    assert mask.dtype == torch.bool
    flipped = Grid(grid.latitude.flip(0), grid.longitude - 180)
    assert torch.equal(land_mask(flipped), mask.flip(0).roll(32, 1))


def test_changing_the_result_does_not_change_the_cache():
    grid = gaussian_grid(8, 16)
    first = land_mask(grid)
    kept = first.clone()
    first.zero_()
    assert torch.equal(land_mask(grid), kept)
    assert kept.any()


def test_rings_are_closed():
    for ring in land_rings():
        assert len(ring) >= 4
        assert (ring[0] == ring[-1]).all()


def test_polylines_never_jump():
    """No line crosses the map from one side to the other or follows its edges."""
    polylines = coastline()
    assert len(polylines) > 100
    for longitude, latitude in polylines:
        assert len(longitude) == len(latitude) >= 2
        assert np.abs(np.diff(longitude)).max() < 12
        assert np.abs(np.diff(latitude)).max() < 12
        edge = np.abs(longitude) >= 179.98
        assert not (edge[1:] & edge[:-1]).any()
    kept = sum(len(longitude) - 1 for longitude, _ in polylines)
    assert sum(len(ring) - 1 for ring in land_rings()) - kept < 25


def test_asset_is_small():
    asset = files("weather.data") / "assets" / "coastline.npz"
    assert len(asset.read_bytes()) <= 60_000
