import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from weather.grid import Grid, gaussian_grid, regular_grid
from weather.observations.operators import BackgroundFrames, ObservationOperator, Places
from weather.state import ChannelSpec

CHANNELS = ChannelSpec(
    surface=("2m_temperature", "10m_u_component_of_wind"),
    upper=("temperature", "u_component_of_wind"),
    levels=(850, 200, 500),
)
ASCENDING = Grid(torch.linspace(-80, 80, 9), torch.arange(-180.0, 180.0, 20.0))
GRIDS = {
    "gaussian": gaussian_grid(16, 32),
    "poles": regular_grid(13, 24, poles=True),
    "ascending": ASCENDING,
}


def places(*rows):
    """Build from (latitude, longitude, channel, pressure, hours)."""
    columns = torch.tensor(rows, dtype=torch.float64).T
    return Places(columns[0], columns[1], columns[2].long(), columns[3], columns[4])


def at(grid, state, latitude, longitude, channel=0, pressure=math.nan):
    h = ObservationOperator(grid, CHANNELS, places((latitude, longitude, channel, pressure, 0)))
    return h(state[None]).item()


def fields(grid, function):
    field = function(grid.latitude[:, None], grid.longitude[None]).expand(grid.shape)
    return field.expand(CHANNELS.num_channels, *grid.shape).clone()


def random_places(draw, count=50):
    number = torch.rand(4, count, generator=draw, dtype=torch.float64)
    channel = torch.randint(CHANNELS.num_channels, (count,), generator=draw)
    pressure = 100 + 900 * number[2]
    return Places(180 * number[0] - 90, 720 * number[1] - 360, channel, pressure, 8 * number[3] - 4)


@pytest.mark.parametrize("name", GRIDS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_it_is_linear_with_an_adjoint(name, seed):
    grid, draw = GRIDS[name], torch.Generator().manual_seed(seed)
    h = ObservationOperator(grid, CHANNELS, random_places(draw), (-3.0, 0.0, 3.0))
    x = torch.randn(2, *h.shape, generator=draw, dtype=torch.float64)
    y = torch.randn(2, 50, generator=draw, dtype=torch.float64)
    leaf = torch.randn(2, *h.shape, generator=draw, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad((h(leaf) * y).sum(), leaf)
    assert (h(x) * y).sum().item() == pytest.approx((x * gradient).sum().item(), abs=1e-11)


@pytest.mark.parametrize("name", GRIDS)
def test_at_a_grid_point_it_is_the_value(name):
    grid = GRIDS[name]
    state = torch.randn(8, *grid.shape, generator=torch.Generator().manual_seed(0))
    rows = [(0, 0), (3, 7), (len(grid.latitude) - 1, grid.shape[1] - 1), (5, 0)]
    for row, column in rows:
        for turn in (-360.0, 0.0, 360.0):
            found = at(grid, state, grid.latitude[row], grid.longitude[column] + turn)
            assert found == pytest.approx(state[0, row, column].item(), abs=1e-5)
    found = at(grid, state, grid.latitude[3], grid.longitude[7], channel=4, pressure=500.0)
    assert found == pytest.approx(state[4, 3, 7].item(), abs=1e-6)  # t500 whatever channel is named


@pytest.mark.parametrize("name", GRIDS)
def test_bilinear_fields_are_exact_and_constants_everywhere(name):
    grid, draw = GRIDS[name], torch.Generator().manual_seed(0)
    one = random_places(draw)
    scalar = one._replace(channel=torch.zeros(50, dtype=torch.long))
    constant = ObservationOperator(grid, CHANNELS, scalar)(
        fields(grid, lambda a, b: 7 + 0 * a)[None]
    )
    assert_close(constant, torch.full((50,), 7.0, dtype=torch.float64))
    west = grid.longitude[0].item()
    tilted = fields(grid, lambda a, b: 2 * a + 0.5 * b + 0.01 * a * b).double()
    for latitude, east in ((11.3, 33.7), (-42.0, 300.5), (60.0, 0.25)):
        longitude = west + min(east, grid.longitude[-1].item() - west)
        expected = 2 * latitude + 0.5 * longitude + 0.01 * latitude * longitude
        for turn in (-360.0, 0.0, 360.0):
            found = at(grid, tilted, latitude, longitude + turn)
            assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.fault("weather Bk")
def test_the_seam_is_a_place_like_any_other():
    """Rolling the field and the station by columns changes nothing, in either convention."""
    for grid in GRIDS.values():
        step = 360.0 / grid.shape[1]
        state = torch.randn(8, *grid.shape, generator=torch.Generator().manual_seed(1)).double()
        inside = at(grid, state, 20.0, grid.longitude[4] + 0.3 * step)
        for columns in range(grid.shape[1]):
            place = grid.longitude[4] + (0.3 + columns) * step
            moved = at(grid, state.roll(columns, -1), 20.0, place)
            assert moved == pytest.approx(inside, rel=1e-10)
        expected = 0.5 * (state[0, :, -1] + state[0, :, 0])
        found = [at(grid, state, lat, grid.longitude[0] - step / 2) for lat in grid.latitude]
        assert_close(torch.tensor(found, dtype=torch.float64), expected)


def test_across_a_pole_scalars_continue_and_winds_turn():
    """Fields that are linear in space near the pole: z = p cos(lon), wind = constant vector."""
    grid = gaussian_grid(16, 32)
    colatitude = 90 - grid.latitude[:, None]
    scalar = fields(grid, lambda a, b: (90 - a) * b.deg2rad().cos()).double()
    for latitude in (86.0, 88.0, 89.5, 90.0):
        for longitude in (0.0, 101.25, 180.0):  # columns of the grid: no error along a circle
            exact = (90 - latitude) * math.cos(math.radians(longitude))
            assert at(grid, scalar, latitude, longitude) == pytest.approx(exact, abs=1e-9)
    vector = fields(grid, lambda a, b: -b.deg2rad().sin() + 0 * a).double()  # a wind along lon 90
    for latitude in (87.0, 90.0):
        for longitude in (0.0, 90.0, 258.75):
            exact = -math.sin(math.radians(longitude))
            assert at(grid, vector, latitude, longitude, channel=1) == pytest.approx(exact)
            wrong = at(grid, vector, latitude, longitude)  # taken for a scalar it would cancel
            assert abs(wrong) <= abs(exact) + 1e-12
    assert at(grid, vector, 90.0, 90.0) == pytest.approx(0.0, abs=1e-9)
    south = at(grid, scalar, -90.0, 0.0)
    assert south == pytest.approx(0.0, abs=1e-9)
    assert colatitude.min() > 0
    poles = GRIDS["poles"]
    state = torch.randn(8, *poles.shape, generator=torch.Generator().manual_seed(0)).double()
    assert at(poles, state, 90.0, 15.0) == pytest.approx(state[0, 0, 1].item())
    assert at(poles, state, -90.0, 15.0) == pytest.approx(state[0, -1, 1].item())


def test_linear_in_the_logarithm_of_pressure():
    grid = GRIDS["gaussian"]
    state = torch.zeros(8, *grid.shape, dtype=torch.float64)
    for index, level in enumerate(CHANNELS.levels):
        state[2 + index] = 250 + 30 * math.log(level)
        state[5 + index] = level  # not linear in ln p
    for pressure in (200.0, 300.0, 500.0, 620.0, 850.0, 190.0, 900.0):
        found = at(grid, state, 10.0, 20.0, channel=2, pressure=pressure)
        assert found == pytest.approx(250 + 30 * math.log(pressure))
    weight = math.log(500 / 300) / math.log(500 / 200)
    expected = 500 + weight * (200 - 500)
    assert at(grid, state, 10.0, 20.0, channel=7, pressure=300.0) == pytest.approx(expected)
    assert at(grid, state, 10.0, 20.0, channel=0, pressure=300.0) == 0.0  # a surface field


def test_time_between_frames_and_beyond_them():
    grid = GRIDS["gaussian"]
    frames = torch.stack([torch.full((8, *grid.shape), value) for value in (1.0, 4.0, 0.0)])
    hours = [-4, -3, -1.5, 0, 1.0, 2.0, 5.0]
    h = ObservationOperator(
        grid, CHANNELS, places(*((0, 0, 0, math.nan, t) for t in hours)), (-3.0, 0.0, 2.0)
    )
    expected = torch.tensor([1.0, 1.0, 2.5, 4.0, 2.0, 0.0, 0.0], dtype=torch.float64)
    assert_close(h(frames), expected)
    single = ObservationOperator(grid, CHANNELS, places((0, 0, 0, math.nan, 2.0)))
    assert single(frames[1:2]).item() == 4.0


def test_one_missing_cell_reaches_no_other_place():
    grid = GRIDS["gaussian"]
    state = torch.zeros(8, *grid.shape)
    state[0, 3, 5] = torch.nan
    assert at(grid, state, grid.latitude[3], grid.longitude[6]) == 0.0
    assert math.isnan(at(grid, state, grid.latitude[3] - 1, grid.longitude[5] + 1))


def test_wrong_arguments_are_refused():
    grid, one = GRIDS["gaussian"], places((0, 0, 0, math.nan, 0))
    with pytest.raises(ValueError, match=r"frame_hours must ascend, found \[0.0, -3.0\]"):
        ObservationOperator(grid, CHANNELS, one, (0.0, -3.0))
    with pytest.raises(ValueError, match=r"expected frames .* \(1, 8, 16, 32\)"):
        ObservationOperator(grid, CHANNELS, one)(torch.zeros(8, 16, 32))
    with pytest.raises(ValueError, match="no frame is at the time of the analysis"):
        _ = BackgroundFrames(torch.zeros(1, 8, 16, 32), (-3.0,)).current
