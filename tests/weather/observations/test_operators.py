"""From states to reports: conversions, interpolation, simulated networks."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from weather.data.shipped import land_mask
from weather.grid import Grid, gaussian_grid, regular_grid
from weather.observations.conversions import (
    flight_level_pressure,
    heights_above_first,
    inconsistent_levels,
    saturation_pressure,
    sea_level_pressure,
    specific_humidity,
    station_pressure,
    virtual_temperature,
    wind_components,
)
from weather.observations.gridded import grid_table
from weather.observations.operators import BackgroundFrames, ObservationOperator, Places
from weather.observations.simulated import (
    bernoulli_network,
    observe,
    simulate_table,
    station_network,
)
from weather.state import ERA5_SAMPLE, ChannelSpec


def test_wind_is_named_after_where_it_comes_from():
    u, v = wind_components(np.full(4, 10.0), np.array([0.0, 90.0, 180.0, 270.0]))
    np.testing.assert_allclose(u, [0, -10, 0, 10], atol=1e-12)
    np.testing.assert_allclose(v, [-10, 0, 10, 0], atol=1e-12)


@pytest.mark.parametrize(
    ("celsius", "pascal"), [(0.0, 611.2), (20.0, 2339.0), (30.0, 4246.8), (-20.0, 125.6)]
)
def test_saturation_pressure_over_water(celsius, pascal):
    assert saturation_pressure(np.array(273.15 + celsius)) == pytest.approx(pascal, rel=1e-3)


def test_humidity_of_saturated_air():
    found = specific_humidity(np.array([2339.0]), np.array([100_000.0]))
    assert found == pytest.approx(0.01468, rel=1e-3)
    assert virtual_temperature(np.array([293.15]), found) == pytest.approx(295.76, abs=0.01)
    assert virtual_temperature(np.array([293.15]), np.array([np.nan])) == 293.15


@pytest.mark.parametrize(
    ("elevation", "hectopascal"), [(0.0, 1013.25), (1000.0, 898.75), (3000.0, 701.09)]
)
def test_the_standard_altimeter_setting_gives_the_standard_pressure(elevation, hectopascal):
    found = station_pressure(np.array(101_325.0), np.array(elevation))
    assert found == pytest.approx(100 * hectopascal, rel=1e-4)


@pytest.mark.parametrize(
    ("altitude", "hectopascal"),
    [(5_000.0, 540.20), (9_144.0, 300.90), (11_000.0, 226.32), (16_000.0, 102.87)],
)
def test_flight_levels_are_heights_of_the_standard_atmosphere(altitude, hectopascal):
    assert flight_level_pressure(np.array(altitude)) == pytest.approx(100 * hectopascal, rel=1e-3)


def test_pressure_is_reduced_back_to_that_of_sea_level_in_the_standard_atmosphere():
    height = np.array([10.0, 250.0, 499.0])
    pressure = station_pressure(np.full(3, 101_325.0), height)
    found = sea_level_pressure(pressure, 288.15 - 0.0065 * height, height)
    np.testing.assert_allclose(found, 101_325.0, atol=5)
    cold = sea_level_pressure(pressure, 258.15 - 0.0065 * height, height)
    assert (np.diff(cold) > 0).all()  # a cold column is heavier, the more so the deeper it is


def test_an_isothermal_layer_has_the_thickness_of_the_hypsometric_equation():
    pressure = np.array([1000.0, 700.0, 500.0])
    found = heights_above_first(pressure, np.full(3, 273.15))
    np.testing.assert_allclose(found, 7995.3 * np.log(1000 / pressure), rtol=1e-4)


MANDATORY = np.array([1000.0, 925, 850, 700, 500, 400, 300, 250, 200, 150, 100])


def sounding(pressure=MANDATORY):
    """Heights rounded to 10 m that fit temperatures rounded to .1 K."""
    virtual = np.round(np.maximum(216.65, 290 * (pressure / 1000) ** 0.19), 1)
    return pressure, np.round(100 + heights_above_first(pressure, virtual), -1), virtual


def test_a_sound_sounding_passes_in_any_order():
    pressure, height, virtual = sounding()
    order = np.random.default_rng(0).permutation(len(pressure))
    for found in inconsistent_levels(pressure[order], height[order], virtual[order]):
        assert not found.any()


@pytest.mark.parametrize("level", range(1, len(MANDATORY) - 1))
@pytest.mark.parametrize("error", [-500.0, 300.0])
def test_a_wrong_height_is_found_and_nothing_else(level, error):
    pressure, height, virtual = sounding()
    height[level] += error
    heights, temperatures = inconsistent_levels(pressure, height, virtual)
    assert np.flatnonzero(heights).tolist() == [level]
    assert not temperatures.any()


def test_a_wrong_temperature_costs_its_layers():
    pressure, height, virtual = sounding()
    virtual[4] += 40  # a wrong sign at 500 hPa
    heights, temperatures = inconsistent_levels(pressure, height, virtual)
    assert np.flatnonzero(temperatures).tolist() == [3, 4, 5]
    assert np.flatnonzero(heights).tolist() == [3, 4, 5]


def test_a_wrong_height_between_close_levels_is_found():
    pressure = np.concatenate([np.linspace(1000, 300, 71)])
    _, height, virtual = sounding(pressure)
    height[33] += 100
    heights, temperatures = inconsistent_levels(pressure, height, virtual)
    assert np.flatnonzero(heights).tolist() == [33]
    assert not temperatures.any()


def test_missing_values_do_not_matter():
    pressure, height, virtual = sounding()
    height[[2, 7]] = np.nan
    virtual[[3, 9]] = np.nan
    height[5] += 400
    heights, temperatures = inconsistent_levels(pressure, height, virtual)
    assert np.flatnonzero(heights).tolist() == [5]
    assert not temperatures.any()
    for few in (0, 1, 2):
        found = inconsistent_levels(pressure[:few], height[:few], virtual[:few])
        assert [one.tolist() for one in found] == [[False] * few] * 2
    assert not np.any(inconsistent_levels(pressure, np.full(len(pressure), np.nan), virtual))


def test_rounded_pressures_high_up_are_accepted():
    pressure = np.array([20.0, 13.4, 10.1, 8.7])
    height = np.round(26_000 + heights_above_first(pressure + 0.04, np.full(4, 220.0)), 1)
    for found in inconsistent_levels(pressure, height, np.full(4, 220.0)):
        assert not found.any()


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
def test_at_a_grid_point_it_is_the_value(name):
    grid = GRIDS[name]
    state = torch.randn(8, *grid.shape, generator=torch.Generator().manual_seed(0))
    for row, column in [(0, 0), (3, 7), (len(grid.latitude) - 1, grid.shape[1] - 1), (5, 0)]:
        for turn in (-360.0, 0.0, 360.0):
            found = at(grid, state, grid.latitude[row], grid.longitude[column] + turn)
            assert found == pytest.approx(state[0, row, column].item(), abs=1e-5)
    found = at(grid, state, grid.latitude[3], grid.longitude[7], channel=4, pressure=500.0)
    assert found == pytest.approx(state[4, 3, 7].item(), abs=1e-6)  # t500 whatever channel is named


@pytest.mark.parametrize("name", GRIDS)
def test_bilinear_fields_are_exact_and_constants_everywhere(name):
    grid, draw = GRIDS[name], torch.Generator().manual_seed(0)
    scalar = random_places(draw)._replace(channel=torch.zeros(50, dtype=torch.long))
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
    assert at(grid, scalar, -90.0, 0.0) == pytest.approx(0.0, abs=1e-9)
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
    expected = 500 + math.log(500 / 300) / math.log(500 / 200) * (200 - 500)
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


GRID = regular_grid(60, 120, poles=False)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("density", [0.0, 0.01, 0.1, 1.0])
def test_bernoulli_density(density):
    network = bernoulli_network(GRID, density, seed=3)
    assert (network.shape, network.dtype) == (GRID.shape, torch.bool)
    deviation = math.sqrt(density * (1 - density) / network.numel())
    assert network.float().mean().item() == pytest.approx(density, abs=4 * deviation + 1e-12)


NETWORKS = {
    "bernoulli": lambda seed: bernoulli_network(GRID, 0.1, seed=seed),
    "stations": lambda seed: station_network(GRID, 200, seed=seed),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_depend_on_the_seed_alone(name):
    torch.manual_seed(0)
    expected, _ = torch.rand(3), torch.manual_seed(0)
    first = NETWORKS[name](5)
    assert torch.equal(torch.rand(3), expected)  # the global generator is left alone
    assert torch.equal(first, NETWORKS[name](5))
    assert not torch.equal(first, NETWORKS[name](6))


def test_stations_prefer_land_and_are_counted():
    network = station_network(GRID, 500, seed=0)
    assert network.sum() == 500
    land = land_mask(GRID)
    weights = GRID.area_weights()[:, None].expand(GRID.shape)
    density = [network[where].sum() / weights[where].sum() for where in (land, ~land)]
    assert 6 < density[0] / density[1] < 18


def test_stations_are_drawn_by_area():
    """Rows near the poles hold fewer stations than their fraction of the grid points."""
    counts = sum(station_network(GRID, 100, seed=seed).sum(1) for seed in range(40))
    polar, tropical = counts[:5].sum() + counts[-5:].sum(), counts[25:35].sum()
    assert polar < 0.6 * tropical


def test_all_points_may_be_stations():
    grid = gaussian_grid(4, 8)
    assert station_network(grid, 32, seed=0).all()


def test_observations_carry_noise_of_the_stated_size():
    truth = torch.randn(20, 2, *GRID.shape, generator=generator())
    network = bernoulli_network(GRID, 0.2, seed=0)
    sd = torch.tensor([10.0, 0.5])
    observations = observe(truth, network, sd, generator=generator(1))
    assert torch.equal(observations.mask, network.expand_as(truth))
    noise = ((observations.values - truth) / sd[:, None, None])[..., network]
    assert_close(noise.std((0, 2)), torch.ones(2), rtol=0.03, atol=0)
    assert (noise.mean((0, 2)).abs() < 4 / math.sqrt(noise[:, 0].numel())).all()
    assert (observations.errors[..., network] == sd[:, None]).all()
    assert observations.values[..., ~network].abs().max() == 0


def test_noise_follows_the_generator():
    truth, network = torch.zeros(1, *GRID.shape), bernoulli_network(GRID, 0.5, seed=0)
    first, same, other = (
        observe(truth, network, torch.ones(1), generator=generator(seed)).values
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_each_channel_may_have_its_own_points_and_errors():
    truth = torch.zeros(3, 2, *GRID.shape)
    network = torch.stack([station_network(GRID, 10, seed=seed) for seed in range(2)])
    errors = torch.rand(truth.shape, generator=generator()) + 0.1
    observations = observe(truth, network, errors, generator=generator())
    assert torch.equal(observations.mask[2], network)
    assert torch.equal(observations.errors[1][network], errors[1][network])


GAUSSIAN = gaussian_grid(16, 32)
TIME = np.datetime64("2017-01-01T12", "ns")
ERRORS = torch.tensor([50.0, 50.0, 0.7, 0.7])


def truth():
    noise = torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([800.0, 900.0, 8.0, 7.0])[:, None, None]
    return torch.tensor([14_000.0, 54_000.0, 280.0, 255.0])[:, None, None] + scale * noise


def simulate(count=300, seed=0, grid=GAUSSIAN, field=None):
    field = truth() if field is None else field
    return simulate_table(
        field, grid, ERA5_SAMPLE, time=TIME, count=count, error_sd=ERRORS, seed=seed
    )


def test_every_station_reports_every_channel_within_the_window():
    frame = simulate().frame
    assert len(frame) == 4 * 300
    assert (frame.groupby("station").size() == 4).all()
    assert frame["station"].nunique() == 300
    offset = (frame["time"] - TIME).abs().max()
    assert np.timedelta64(150, "m") < offset <= np.timedelta64(180, "m")


@pytest.mark.parametrize(
    "grid", [GAUSSIAN, Grid(GAUSSIAN.latitude.flip(0), GAUSSIAN.longitude - 180)]
)
def test_gridded_reports_return_the_truth_within_their_errors(grid):
    gridded = grid_table(simulate(2000, grid=grid), grid, ERA5_SAMPLE, TIME)
    scaled = ((gridded.values - truth()) / gridded.errors)[gridded.mask]
    assert scaled.std().item() == pytest.approx(1, abs=0.07)
    assert scaled.mean().item() == pytest.approx(0, abs=0.1)
    assert gridded.errors[gridded.mask].min() < 0.5  # some cells hold several reports


def test_seed_decides():
    assert simulate(seed=1).frame.equals(simulate(seed=1).frame)
    assert not simulate(seed=1).frame["value"].equals(simulate(seed=2).frame["value"])


def operator(*frame_hours, frames=None):
    place = places((0, 0, 0, math.nan, 0))
    h = ObservationOperator(GRIDS["gaussian"], CHANNELS, place, *frame_hours)
    return h if frames is None else h(frames)


def observed(error):
    network = bernoulli_network(GRID, 0.1, seed=0)
    return observe(
        torch.zeros(1, *GRID.shape), network, torch.tensor([error]), generator=generator()
    )


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (lambda: operator((0.0, -3.0)), r"frame_hours must ascend, found \[0.0, -3.0\]"),
        (
            lambda: operator(frames=torch.zeros(8, 16, 32)),
            r"expected frames .* \(1, 8, 16, 32\)",
        ),
        (
            lambda: BackgroundFrames(torch.zeros(1, 8, 16, 32), (-3.0,)).current,
            "no frame is at the time of the analysis",
        ),
        (lambda: bernoulli_network(GRID, -0.1, seed=0), "a fraction of the grid points from 0"),
        (lambda: bernoulli_network(GRID, 1.1, seed=0), "a fraction of the grid points from 0 to"),
        (lambda: bernoulli_network(GRID, math.nan, seed=0), "a fraction of the grid points"),
        (
            lambda: station_network(gaussian_grid(4, 8), 33, seed=0),
            "count is 33, expected 0 to 32, the points of the grid",
        ),
        (lambda: observed(0.0), "expected a positive standard deviation"),
        (lambda: observed(-1.0), "expected a positive standard deviation"),
    ],
)
def test_wrong_arguments_are_refused(refused, words):
    with pytest.raises(ValueError, match=words):
        refused()
