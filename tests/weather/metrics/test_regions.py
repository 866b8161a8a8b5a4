import pytest
import torch
from torch.testing import assert_close

from weather.grid import regular_grid
from weather.metrics import REGIONS, mask_weights, mse, region_weights, spatial_mean

NAMES = {
    "tropics": "tropics",
    "extratropics": "extratropics",
    "northern": "nhem",
    "europe": "europe",
    "global": "timemean",
}


@pytest.mark.parametrize("region", NAMES)
def test_golden(golden, same, region):
    weights = region_weights(golden.grid, region)
    expected = getattr(golden, f"wb2_mse_{NAMES[region]}")
    same(mse(golden.forecast, golden.truth, weights).mean(1), expected)


def test_south_mirrors_north():
    grid = regular_grid(19, 12, poles=True)
    south, north = region_weights(grid, "southern"), region_weights(grid, "northern")
    assert_close(south, north.flip(0))
    assert (south[:-8] == 0).all()  # south of 20 degrees: the last eight rows
    assert (south[-7:] > 0).all()


def test_every_listed_region_exists():
    grid = regular_grid(19, 36, poles=True)
    assert all(region_weights(grid, region).any() for region in REGIONS)
    with pytest.raises(ValueError, match="asia"):
        region_weights(grid, "asia")


def test_land_and_sea_make_the_globe():
    grid = regular_grid(8, 16, poles=False)
    field = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).double()
    land = torch.zeros(8, 16, dtype=torch.bool)
    land[2:5, 3:9] = True
    parts = [mask_weights(grid, mask) for mask in (land, ~land)]
    areas = [part.sum() for part in parts]
    mean = sum(area * spatial_mean(field, part) for area, part in zip(areas, parts, strict=True))
    assert_close(mean / sum(areas), spatial_mean(field, grid.area_weights()))


def test_what_lies_outside_does_not_matter():
    grid = regular_grid(8, 16, poles=False)
    weights = region_weights(grid, "northern")
    field = torch.ones(8, 16).where(weights > 0, torch.nan)
    assert spatial_mean(field, weights) == pytest.approx(1.0)
    assert spatial_mean(torch.full((8, 16), torch.nan), weights).isnan()


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="weights"):
        spatial_mean(torch.zeros(4, 8), torch.ones(5))
    with pytest.raises(ValueError, match="mask"):
        mask_weights(regular_grid(4, 8, poles=False), torch.zeros(4, 8, dtype=torch.bool))
