import pytest
import torch
from torch.testing import assert_close

from weather.grid import regular_grid
from weather.metrics import mse, spatial_mean


def test_golden_tropics(golden, same):
    """An area is a weight (H, W) of zero outside of it."""
    tropics = golden.grid.latitude.abs() <= 20
    weights = (golden.weights * tropics)[:, None].expand(golden.grid.shape)
    same(mse(golden.forecast, golden.truth, weights).mean(1), golden.wb2_mse_tropics)


def test_land_and_sea_make_the_globe():
    weights = regular_grid(8, 16, poles=False).area_weights()
    field = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).double()
    land = torch.zeros(8, 16, dtype=torch.bool)
    land[2:5, 3:9] = True
    parts = [weights[:, None] * mask for mask in (land, ~land)]
    areas = [part.sum() for part in parts]
    mean = sum(area * spatial_mean(field, part) for area, part in zip(areas, parts, strict=True))
    assert_close(mean / sum(areas), spatial_mean(field, weights))


def test_what_lies_outside_does_not_matter():
    weights = torch.ones(8, 16)
    weights[4:] = 0
    field = torch.ones(8, 16).where(weights > 0, torch.nan)
    assert spatial_mean(field, weights) == pytest.approx(1.0)
    assert spatial_mean(torch.full((8, 16), torch.nan), weights).isnan()


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="weights"):
        spatial_mean(torch.zeros(4, 8), torch.ones(5))
