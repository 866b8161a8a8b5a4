"""Regridding: conservation, exactness, missing values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from weather.grid import Grid, Regridder, gaussian_grid, regular_grid

GRIDS = {
    "gaussian": gaussian_grid(32, 64),
    "no poles": regular_grid(15, 30, poles=False),
    "poles": regular_grid(61, 120, poles=True),
    "ascending from -180": Grid(
        torch.linspace(-90, 90, 19, dtype=torch.float64), torch.arange(-180.0, 180.0, 10.0)
    ),
    "uneven": Grid(
        torch.tensor([80.0, 50.0, 47.0, -10.0, -70.0]), torch.tensor([3.0, 20.0, 100.0, 359.0])
    ),
}
PAIRS = [(a, b) for a in GRIDS for b in GRIDS if a != b]


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_conservative_keeps_the_area_mean(source, target):
    source, target = GRIDS[source], GRIDS[target]
    field = torch.randn(3, *source.shape, dtype=torch.float64)
    regridded = Regridder(source, target)(field)
    assert regridded.shape == (3, *target.shape)
    widths = [grid.longitude_bounds().diff() / 360 for grid in (source, target)]
    means = [
        (values * width).sum(-1) @ (grid.area_weights() / len(grid.latitude))
        for values, width, grid in zip((field, regridded), widths, (source, target), strict=True)
    ]
    assert_close(means[1], means[0], atol=1e-13, rtol=0)


@pytest.mark.parametrize("method", ["conservative", "bilinear"])
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_constants_stay_and_no_new_extremes_appear(source, target, method):
    regridder = Regridder(GRIDS[source], GRIDS[target], method)
    ones = regridder(torch.full(GRIDS[source].shape, 7.0, dtype=torch.float64))
    assert_close(ones, torch.full_like(ones, 7.0), atol=1e-13, rtol=0)
    field = torch.rand(GRIDS[source].shape, dtype=torch.float64)
    regridded = regridder(field)
    assert regridded.min() >= field.min() - 1e-12
    assert regridded.max() <= field.max() + 1e-12
    assert regridded.std() > 0.01


def test_conservative_averages_blocks_of_cells():
    fine, coarse = regular_grid(8, 12, poles=False), regular_grid(8, 4, poles=False)
    coarse = Grid(coarse.latitude, coarse.longitude + 30)  # three cells in one
    field = torch.randn(8, 12, dtype=torch.float64)
    expected = field.reshape(8, 4, 3).mean(-1)
    assert_close(Regridder(fine, coarse)(field), expected)
    back = Regridder(coarse, fine)(expected)
    assert_close(back, expected.repeat_interleave(3, dim=1))


def test_conservative_weights_rows_by_their_area():
    fine, coarse = regular_grid(4, 1, poles=False), regular_grid(2, 1, poles=False)
    field = torch.tensor([[1.0], [0.0], [0.0], [0.0]], dtype=torch.float64)
    share = 1 - torch.tensor(45.0).double().deg2rad().sin()
    assert_close(Regridder(fine, coarse)(field), torch.tensor([[share], [0.0]]).double())


@settings(max_examples=25, deadline=None)
@given(
    slope=st.floats(-5, 5),
    rows=st.integers(2, 40),
    columns=st.integers(1, 40),
    poles=st.booleans(),
)
def test_bilinear_is_exact_for_linear_fields(slope, rows, columns, poles):
    source = regular_grid(37, 72, poles=True)
    target = regular_grid(rows, columns, poles=poles)
    along = (source.longitude - 180).abs()  # linear on both sides of the date line and of 0
    field = 2 + slope * source.latitude[:, None] + along
    exact = 2 + slope * target.latitude[:, None] + (target.longitude - 180).abs()
    assert_close(Regridder(source, target, "bilinear")(field), exact, atol=1e-9, rtol=0)


def test_bilinear_keeps_the_outermost_rows_beyond_them():
    source, target = regular_grid(10, 4, poles=False), regular_grid(3, 4, poles=True)
    field = torch.randn(10, 4, dtype=torch.float64)
    regridded = Regridder(source, target, "bilinear")(field)
    assert_close(regridded[[0, 2]], field[[0, -1]])


@pytest.mark.parametrize("method", ["conservative", "bilinear"])
def test_same_grid_is_the_identity(method):
    for grid in GRIDS.values():
        field = torch.randn(grid.shape, dtype=torch.float64)
        assert_close(Regridder(grid, grid, method)(field), field, atol=1e-12, rtol=0)


@pytest.mark.parametrize("method", ["conservative", "bilinear"])
def test_missing_values_spoil_only_what_they_contribute_to(method):
    source, target = GRIDS["poles"], GRIDS["gaussian"]
    regridder = Regridder(source, target, method)
    field = torch.randn(source.shape, dtype=torch.float64)
    whole = regridder(field)
    field[30, 60] = torch.nan  # equator, 180 E
    field[31, 60] = torch.inf
    holed = regridder(field)
    spoiled = holed.isnan()
    assert 1 <= spoiled.sum() <= 9
    assert torch.equal(holed[~spoiled], whole[~spoiled])
    assert spoiled[15:17, 31:34].any()
    assert not spoiled[:, :28].any()


@pytest.mark.parametrize("method", ["conservative", "bilinear"])
def test_missing_value_stays_alone_on_the_same_grid(method):
    grid = GRIDS["gaussian"]
    field = torch.randn(grid.shape)
    field[7, 9] = torch.nan
    spoiled = Regridder(grid, grid, method)(field).isnan()
    assert spoiled.nonzero().tolist() == [[7, 9]]


def test_float32_fields_stay_float32():
    field = torch.randn(2, 61, 120)
    assert Regridder(GRIDS["poles"], GRIDS["gaussian"])(field).dtype == torch.float32


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="'cubic'"):
        Regridder(GRIDS["poles"], GRIDS["gaussian"], "cubic")
    with pytest.raises(ValueError, match=r"\(61, 120\)"):
        Regridder(GRIDS["poles"], GRIDS["gaussian"])(torch.zeros(60, 120))
