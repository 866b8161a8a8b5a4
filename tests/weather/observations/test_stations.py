import math

import pytest
import torch
from torch.testing import assert_close

from weather.observations.operators.interpolation import BackgroundFrames
from weather.observations.stations import Stations
from weather.spectral_state import FieldLayout, PointEvaluation, to_coefficients, to_states
from weather.spherical import SphericalTransform
from weather.state import SHALLOW_WATER, ChannelSpec

TRANSFORM = SphericalTransform(12, 20, 40)
GRID = TRANSFORM.grid
LAYOUT = FieldLayout.of(SHALLOW_WATER)
SD = torch.tensor([10.0, 1.0, 1.0])


def states(count=2, seed=0, steepness=1.5):
    """Random states of the truncation, smooth."""
    draw = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, 13, 13, 3, count, generator=draw, dtype=torch.float64)
    noise = noise * (1 + TRANSFORM.degree[:, None, None]) ** -steepness
    order = torch.arange(13)[:, None]
    noise = noise * (order <= torch.arange(13))[:, :, None, None]
    noise[1, 0] = 0
    noise[:, 0, 0, 1:] = 0
    scale = torch.tensor([100.0, 1e-5, 1e-6], dtype=torch.float64)
    return to_states(noise * scale[:, None], TRANSFORM, LAYOUT)


def test_coefficients_and_states_are_inverse():
    x = states()
    assert_close(to_states(to_coefficients(x, TRANSFORM, LAYOUT), TRANSFORM, LAYOUT), x)


def test_channels_keep_their_order():
    mixed = ChannelSpec(
        upper=("v_component_of_wind", "temperature", "u_component_of_wind"), levels=(500, 850)
    )
    layout = FieldLayout.of(mixed)
    assert layout == FieldLayout((2, 3), (4, 5), (0, 1))
    x, other = states(seed=1), states(seed=2)
    both = torch.stack((x[:, 2], other[:, 2], x[:, 0], other[:, 0], x[:, 1], other[:, 1]), 1)
    assert_close(to_states(to_coefficients(both, TRANSFORM, layout), TRANSFORM, layout), both)


def test_at_grid_points_the_evaluation_is_the_state():
    x = states()
    latitude, longitude = GRID.latitude.repeat_interleave(40), GRID.longitude.repeat(20)
    found = PointEvaluation(TRANSFORM, latitude, longitude)(
        to_coefficients(x, TRANSFORM, LAYOUT), LAYOUT
    )
    assert_close(found, x.flatten(2), rtol=1e-11, atol=1e-11)


def test_a_known_field_anywhere():
    """Height cos(lat) sin(lon) and solid rotation about the axis, at places off the grid."""
    lat, lon = GRID.latitude.deg2rad()[:, None], GRID.longitude.deg2rad()
    x = torch.stack((lat.cos() * lon.sin(), 30 * lat.cos() * torch.ones_like(lon), 0 * lat * lon))
    latitude = torch.tensor([-90.0, -33.3, 0.0, 71.7, 90.0], dtype=torch.float64)
    longitude = torch.tensor([12.0, -77.7, 359.9, 181.0, 0.0], dtype=torch.float64)
    found = PointEvaluation(TRANSFORM, latitude, longitude)(
        to_coefficients(x[None], TRANSFORM, LAYOUT), LAYOUT
    )[0]
    phi, lam = latitude.deg2rad(), longitude.deg2rad()
    assert_close(found[0], phi.cos() * lam.sin(), rtol=0, atol=1e-7)
    assert_close(found[1], 30 * phi.cos(), rtol=0, atol=1e-6)
    assert_close(found[2], torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-10)


def test_interpolation_is_nearer_to_the_truth_than_the_nearest_cell():
    truth = states(1)[0]
    frames = BackgroundFrames.single(truth)
    stations = Stations(TRANSFORM, SHALLOW_WATER, 300, SD, seed=0)
    values = stations.observe(frames)
    near = stations.gridded(values)
    assert int(near.mask.sum()) > 500
    apart = torch.where(near.mask, near.values - truth, 0.0)
    interpolated = stations.gridded(values, frames)
    closer = torch.where(interpolated.mask, interpolated.values - truth, 0.0)
    assert torch.equal(interpolated.errors, near.errors)
    for channel in range(3):
        assert closer[channel].norm() < 0.4 * apart[channel].norm()


def test_the_innovation_of_a_background_with_constant_error_is_that_error():
    """A cell receives x_b + (y - H x_b): a background that is wrong by 5 moves it by 5."""
    truth = states(1)[0]
    offset = torch.tensor([5.0, 0.0, 0.0], dtype=torch.float64)[:, None, None]
    stations = Stations(TRANSFORM, SHALLOW_WATER, 100, SD, seed=1)
    frames = BackgroundFrames.single(truth - offset)
    exact = stations.gridded(
        stations.observe(BackgroundFrames.single(truth)), BackgroundFrames.single(truth)
    )
    moved = stations.gridded(stations.observe(BackgroundFrames.single(truth)), frames)
    seen = moved.mask[0]
    assert_close(moved.values[0][seen], exact.values[0][seen], rtol=0, atol=1e-4)
    innovation = (moved.values[0] - frames.current[0])[seen] - (exact.values[0] - truth[0])[seen]
    assert_close(innovation, torch.full_like(innovation, 5.0), rtol=0, atol=1e-3)


def test_reports_are_of_their_own_time():
    early, late = states(2)
    stations = Stations(TRANSFORM, SHALLOW_WATER, 50, SD, seed=2, spread_hours=3.0)
    assert stations.hours.min() < -2 < 2 < stations.hours.max()
    frames = BackgroundFrames(torch.stack((early, (early + late) / 2, late)), (-3.0, 0.0, 3.0))
    values = stations.observe(frames).view(3, 50)
    ends = [stations.observe(BackgroundFrames.single(x)).view(3, 50) for x in (early, late)]
    weight = (stations.hours + 3) / 6
    assert_close(values, (1 - weight) * ends[0] + weight * ends[1])
    with_time = stations.gridded(values.flatten(), frames)
    without = stations.gridded(values.flatten(), BackgroundFrames.single(frames.current))
    seen = with_time.mask
    error = [(g.values - frames.current)[seen].square().mean() for g in (with_time, without)]
    assert error[0] < 0.2 * error[1]


def test_errors_have_the_stated_size():
    truth = BackgroundFrames.single(states(1)[0])
    stations = Stations(TRANSFORM, SHALLOW_WATER, 2000, SD, seed=3)
    noise = stations.observe(truth, torch.Generator().manual_seed(0)) - stations.observe(truth)
    assert_close(noise.view(3, -1).std(1).float(), SD, rtol=0.06, atol=0)
    latitudes = stations.places.latitude[:2000]
    assert (latitudes.deg2rad().sin().abs() < 0.5).double().mean().item() == pytest.approx(
        0.5, abs=0.04
    )
    assert not math.isnan(float(latitudes.sum()))
