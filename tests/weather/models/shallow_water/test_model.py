"""Shallow-water model: the standard tests of Williamson et al. (1992), budgets, statistics."""

import math

import pytest
import torch
from torch.testing import assert_close

from weather.models.leapfrog import GRAVITY, ROTATION
from weather.models.shallow_water.model import (
    ShallowWater,
    jet_profile,
    mountain_heights,
    stirring_pattern,
)
from weather.spherical import EARTH_RADIUS_M
from weather.state import SHALLOW_WATER

DAYS = 24.0


def unforced(**arguments):
    """The bare equations over a flat bottom: no stirring, relaxation, drag or diffusion."""
    off = {"stirring": 0.0, "mountains": 0.0}
    off |= dict.fromkeys(("relaxation_days", "drag_days", "diffusion_hours"), math.inf)
    return ShallowWater(**(off | arguments))


@pytest.fixture(scope="module")
def model():
    return ShallowWater()


@pytest.fixture(scope="module")
def climate(model):
    """The daily history of 6 members over 40 days (T, N, 3, H, W), after a spin-up."""
    state = model(model.initial_state(6, seed=3), 20 * DAYS)
    history = []
    for _ in range(40):
        state = model(state, DAYS)
        history.append(state)
    return torch.stack(history).double()


def sphere_norm(grid, field):
    return grid.area_mean(field.double().square()).sqrt()


def steady_zonal_flow(tilt, time_step):
    """Williamson test 2: solid-body flow in balance, its axis tilted; returns model and state."""
    speed, height = 2 * math.pi * EARTH_RADIUS_M / (12 * 86400), 2.94e4 / GRAVITY
    drop = (EARTH_RADIUS_M * ROTATION * speed + speed**2 / 2) / GRAVITY
    model = unforced(mean_depth=height - drop / 3, time_step=time_step)
    lat, lon = model.grid.latitude.deg2rad()[:, None], model.grid.longitude.deg2rad()
    sine = -lon.cos() * lat.cos() * math.sin(tilt) + lat.sin() * math.cos(tilt)
    u = speed * (lat.cos() * math.cos(tilt) + lon.cos() * lat.sin() * math.sin(tilt))
    v = (-speed * lon.sin() * math.sin(tilt)).expand_as(u)
    planetary = model.transform.pack_grid(2 * ROTATION * sine)
    model._offset[:, :, :, 0] = model.transform.analysis(planetary)
    return model, torch.stack((height - drop * sine.square(), u, v))[None]


@pytest.mark.parametrize("tilt", [0.0, 0.05, math.pi / 4, math.pi / 2])
def test_williamson_2_is_steady(tilt):
    model, state = steady_zonal_flow(tilt, 3600.0)
    error = model(state, 5 * DAYS) - state
    relative = sphere_norm(model.grid, error) / sphere_norm(model.grid, state)
    assert relative[0, 0] < 1e-10
    assert relative[0, 1] < 1e-10


def rossby_haurwitz(depth, time_step):
    """Williamson test 6: the wave of zonal wavenumber 4; returns model and state."""
    spin, order = 7.848e-6, 4
    model = unforced(mean_depth=depth, time_step=time_step)
    transform = model.transform
    lat, lon = model.grid.latitude.deg2rad()[:, None], model.grid.longitude.deg2rad()
    steep = order**2 + 3 * order + 2
    wave = lat.sin() * lat.cos() ** order * (order * lon).cos()
    vorticity = transform.pack_grid(2 * spin * lat.sin() - spin * steep * wave)
    return model, model.to_state(model.balance(transform.analysis(vorticity)))


def eastward_shift(model, before, after):
    """Return how far zonal wavenumber 4 of the northward wind moved, degrees."""
    transform = model.transform
    packed = (transform.analysis(transform.pack_grid(state[0, 2])) for state in (before, after))
    first, second = (torch.complex(*waves[:, 4, :, 0]) for waves in packed)
    return -math.degrees((second * first.conj()).sum().angle()) / 4


def test_williamson_6_moves_like_the_barotropic_wave_in_deep_fluid():
    spin, order = 7.848e-6, 4
    rate = (order * (3 + order) * spin - 2 * ROTATION) / ((1 + order) * (2 + order))
    model, state = rossby_haurwitz(depth=1e7, time_step=1800.0)
    moved = eastward_shift(model, state, model(state, 24.0))
    assert moved == pytest.approx(math.degrees(rate) * 86400, rel=0.01)


def test_mass_is_conserved(model, climate):
    state = climate[-1, :2]
    before, after = (model.to_spectral(s)[0, 0, 0, 2] for s in (state, model(state, 6.0)))
    depth = model.mean_depth * GRAVITY
    assert ((after - before) / depth).abs().max() < 1e-12
    free = ShallowWater(stirring=0.0, relaxation_days=math.inf)
    before, after = (free.to_spectral(s)[0, 0, 0, 2] for s in (state, free(state, 5 * DAYS)))
    assert ((after - before) / depth).abs().max() < 1e-12


def test_energy_of_the_bare_equations_is_nearly_conserved(climate):
    bare = unforced(time_step=600.0)

    def energy(state):
        height, u, v = state.unbind(1)
        return bare.grid.area_mean(height * (u**2 + v**2) + GRAVITY * height**2)

    state = climate[-1, :1]
    available = energy(state) - GRAVITY * bare.mean_depth**2
    assert ((energy(bare(state, DAYS)) - energy(state)) / available).abs().max() < 0.02


def without_rotation(**arguments):
    model = unforced(time_filter=0.0, **arguments)
    model._offset.zero_()
    return model


@pytest.mark.parametrize("time_step", [600.0, 3600.0])
def test_gravity_wave_has_the_frequency_of_the_semi_implicit_scheme(time_step):
    depth, degree = 10000.0, 6
    model = without_rotation(mean_depth=depth, time_step=time_step)
    spectral = torch.zeros(2, 22, 22, 3, 1, dtype=torch.float64)
    spectral[0, 3, degree, 2] = GRAVITY * 1e-3
    state = model.to_state(spectral)
    later = model.to_spectral(model(state, 6.0))[0, 3, degree, 2].item() / (GRAVITY * 1e-3)
    frequency = math.sqrt(degree * (degree + 1) * GRAVITY * depth) / EARTH_RADIUS_M
    phase = 6 * 3600 / time_step * math.atan(frequency * time_step)
    assert later == pytest.approx(math.cos(phase), abs=1e-6)


def test_forcing_is_as_specified(model):
    grid = model.grid
    jet = jet_profile(grid)[:, 0]
    assert jet[grid.latitude > 0].max() == pytest.approx(60, abs=0.5)
    assert jet[grid.latitude < 0].max() == pytest.approx(54, abs=0.5)
    assert (jet[(grid.latitude.abs() - 45).abs() > 24.01] == 0).all()
    heights = mountain_heights(grid)
    assert 900 < heights.max() <= 1000
    east, west = heights[:, 16], heights[:, 44]  # 90 E and 247.5 E
    assert grid.latitude[east.argmax()] == pytest.approx(45, abs=3)
    assert 700 < west.max() < 800
    pattern = stirring_pattern(model.transform, seed=5)[0]
    power = pattern.abs().square()
    assert power[0].sum() + 2 * power[1:].sum() == pytest.approx(1)
    assert (power[:, (model.transform.degree < 5) | (model.transform.degree > 12)] == 0).all()
    assert not torch.equal(pattern, stirring_pattern(model.transform, seed=6)[0])


def test_stirring_and_relaxation_act_on_a_fluid_at_rest():
    rest = torch.zeros(1, 3, 32, 64, dtype=torch.float64)
    rest[:, 0] = 10000.0
    relaxed = unforced(relaxation_days=7.0)
    gained = relaxed.to_spectral(relaxed(rest, 1.0))
    expected = relaxed.balance(relaxed._jets) / (7 * 24)
    assert_close(gained[..., 1, :], expected[..., 1, :], rtol=1e-9, atol=1e-18)
    assert gained[0, 0, 2, 2].item() == pytest.approx(expected[0, 0, 2, 2].item(), rel=0.2)
    stirred = unforced(stirring=2e-10, stirring_seed=4)
    gained = stirred.to_spectral(stirred(rest, 1.0))
    pattern = stirred.transform.pack_coefficients(stirring_pattern(stirred.transform, 4))
    assert_close(gained[..., 1, :], 2e-10 * 3600 * pattern, rtol=1e-9, atol=1e-18)
    assert gained[..., [0, 2], :].abs().max() < 1e-9


def test_drag_acts_on_the_divergence_alone():
    model = without_rotation(drag_days=20.0, mean_depth=1e-6)
    spectral = torch.zeros(2, 22, 22, 3, 1, dtype=torch.float64)
    spectral[0, 2, 5, :2] = 1e-10
    later = model.integrate(spectral, 24)[0, 2, 5, :, 0] / 1e-10
    assert later[0].item() == pytest.approx(math.exp(-1 / 20), rel=1e-3)
    assert later[1].item() == pytest.approx(1.0, rel=1e-3)


def test_diffusion_damps_the_smallest_scale_by_e_in_six_hours():
    model = without_rotation(diffusion_hours=6.0)
    spectral = torch.zeros(2, 22, 22, 3, 1, dtype=torch.float64)
    spectral[0, 0, 21, 1] = spectral[0, 0, 10, 1] = 1e-10
    later = model.integrate(spectral, 6)[0, 0, :, 1, 0] / 1e-10
    assert later[21].item() == pytest.approx(math.exp(-1), rel=1e-4)
    scale = (10 * 11 / (21 * 22)) ** 4
    assert later[10].item() == pytest.approx(math.exp(-scale), rel=1e-4)


def test_balance_leaves_no_divergence_tendency(model):
    state = model.balance(model._jets)
    tendency = model.tendency(state)[..., 0, :]
    linear = -model.transform.laplacian[:, None] * state[..., 2, :]
    assert (tendency + linear)[:, :, 1:].abs().max() < 1e-12 * linear.abs().max()
    assert state[..., 2, :].abs().max() > 1000


def test_a_day_equals_four_calls_over_six_hours(model, climate):
    for dtype in (torch.float32, torch.float64):
        state = climate[-1, :3].to(dtype)
        stepped = state
        for _ in range(4):
            stepped = model(stepped, 6.0)
        whole = model(state, 24.0)
        assert whole.dtype == dtype
        assert torch.equal(whole, stepped)
        assert not torch.equal(whole, state)
    assert torch.equal(model(state, 0.0), state)


def test_repeated_runs_are_identical_and_members_do_not_touch(model, climate):
    state = climate[-1, :6].float()
    batched = model(state, 24.0)
    assert torch.equal(batched, model(state, 24.0))
    single = torch.cat([model(member[None], 24.0) for member in state])
    assert_close(batched, single, rtol=1e-6, atol=1e-5)
    assert (batched == single).float().mean() > 0.999
    changed = state.clone()
    changed[0] = state[3]
    assert torch.equal(model(changed, 24.0)[1:], batched[1:])


def test_initial_states_depend_on_seed_and_number_only(model):
    four = model.initial_state(4, seed=1)
    assert (four.shape, four.dtype) == ((4, 3, 32, 64), torch.float32)
    assert_close(model.initial_state(2, seed=1), four[:2], rtol=1e-6, atol=1e-4)
    assert ((four[0] - four[1]).abs().amax((-1, -2)) > 1).all()
    assert not torch.equal(model.initial_state(4, seed=2), four)
    assert model.channels == SHALLOW_WATER


def test_climate_is_lively_and_stationary(model, climate):
    deviation = (climate - climate.mean((0, 1))).square().mean(1)
    halves = [model.grid.area_mean(part.mean(0)).sqrt() for part in deviation.split(20)]
    spread = torch.stack(halves).mean(0)
    assert (spread > torch.tensor([200.0, 13.0, 12.0])).all()
    assert (spread < torch.tensor([350.0, 23.0, 22.0])).all()
    assert_close(halves[0], halves[1], rtol=0.2, atol=0)
    assert climate[:, :, 1:].abs().max() < 150


def test_casting_the_surroundings_leaves_the_arithmetic_in_float64(climate):
    state = climate[-1, :2].float()
    cast = torch.nn.ModuleList([ShallowWater()]).to(torch.bfloat16)[0]
    assert cast.transform.laplacian.dtype == torch.float64
    assert torch.equal(cast(state, 6.0), ShallowWater()(state, 6.0))


def test_gradients_reach_the_initial_state(model, climate):
    state = climate[-1, :1].clone().requires_grad_()
    model(state, 6.0)[0, 0, 8, 8].backward()
    step = 1e-3
    place = (0, 0, 9, 6)
    moved = climate[-1, :1].clone()
    moved[place] += step
    numeric = (model(moved, 6.0) - model(climate[-1, :1], 6.0))[0, 0, 8, 8] / step
    assert state.grad[place].item() == pytest.approx(numeric.item(), rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"time_step": 5000.0}, "divide 21600"),
        ({"time_step": 0.0}, "divide 21600"),
        ({"relaxation_days": 0.0}, "relaxation_days"),
        ({"truncation": 32}, "truncation 32"),
        ({"truncation": 8}, "12"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, refused):
    refused(message, ShallowWater, **arguments, error=ValueError)


def test_bad_states_and_hours_are_refused(model, refuses):
    refuses(
        ValueError,
        ("expected a state", lambda: model(torch.zeros(3, 32, 64), 6.0)),
        ("multiple of the time step", lambda: model(torch.zeros(1, 3, 32, 64), 6.5)),
    )


def test_a_fast_member_takes_half_the_step_and_the_others_do_not_notice():
    """Stirring seeds 3, 4 and 7 leave the finite numbers at 3,600 s without it."""
    grid = {"truncation": 12, "num_latitudes": 16, "num_longitudes": 32}
    model, finer = ShallowWater(**grid), ShallowWater(**grid, time_step=1800.0)
    slow, fast = model.initial_state(2, seed=0)
    fast[1:] *= 280.0 / float(fast[1:].square().sum(0).max().sqrt())  # m/s
    states = torch.stack((slow, fast))
    assert (model.halvings(states).tolist(), finer.halvings(states).tolist()) == ([0, 1], [0, 0])
    later = model(states, 6.0)
    assert torch.equal(later[:1], model(slow[None], 6.0))
    assert torch.equal(later[1:], finer(fast[None], 6.0))
    assert not torch.equal(later[:1], finer(slow[None], 6.0))
    ends = torch.stack((100 * fast, torch.full_like(fast, torch.nan)))
    assert model.halvings(ends).tolist() == [3, 0]
