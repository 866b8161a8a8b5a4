"""Held-Suarez model: closed forms, budgets, an independent core's trajectory and climate."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from weather.grid import gaussian_nodes
from weather.models.held_suarez.model import (
    REFERENCE_TEMPERATURE,
    HeldSuarez,
    equilibrium_temperature,
    friction_rates,
    relaxation_rates,
)
from weather.models.held_suarez.primitive_equations import SigmaLevels, subtract_vertical_advection
from weather.models.leapfrog import DAY, GAS_CONSTANT, KAPPA, ROTATION
from weather.spherical import EARTH_RADIUS_M

GOLDEN = Path(__file__).parents[3] / "golden" / "weather" / "held_suarez_T21_L8_stats.npz"
SMALL = {
    "truncation": 15,
    "num_latitudes": 24,
    "num_longitudes": 48,
    "num_layers": 5,
    "time_step": 3600.0,
}


@pytest.fixture(scope="module")
def weather():
    """A small model and three of its states with developed eddies (3, 16, 24, 48)."""
    model = HeldSuarez(**SMALL)
    state = model.initial_state(3, seed=0)
    zonal = state.mean(-1, keepdim=True)
    with torch.no_grad():  # thirty times the noise, so that it grows in days
        state = model(zonal + 30 * (state - zonal), 10 * 24.0)
    assert (state[:, 11:].std((-1, -2)) > 2).all()  # northward wind: there is weather
    return model, state.double()


def mean(model, field):
    """Return the mean of (..., H, W) over the sphere, by Gaussian quadrature."""
    _, weights = gaussian_nodes(model.grid.shape[0])
    return field.mean(-1) @ weights / 2


def parts(model, state):
    surface, upper = model.channels.split(state)
    return surface[:, 0], *upper.unbind(1)


@pytest.mark.parametrize("layers", [2, 5, 8, 13])
def test_vertical_operators(layers):
    levels = SigmaLevels(layers)
    isothermal = torch.full((layers,), 250.0, dtype=torch.float64)
    assert_close(isothermal @ levels.hydrostatic, -GAS_CONSTANT * 250 * levels.centers.log())
    assert (torch.ones(layers, dtype=torch.float64) @ levels.lift).abs().max() < 1e-14
    tilted = levels.centers - 0.5  # convergence aloft: the velocity is a parabola
    edges = torch.arange(1, layers).double() / layers
    assert_close(tilted @ levels.lift, edges * (1 - edges) / 2)
    rate = torch.zeros(layers, dtype=torch.float64)
    subtract_vertical_advection(rate, 3 * levels.centers, torch.ones(layers - 1), 1 / layers)
    assert_close(rate[1:-1], torch.full((layers - 2,), -3.0).double())
    assert_close(rate[[0, -1]], torch.full((2,), -1.5).double())
    # What pressure does on the wind it takes from the heat: hydrostatic and compression adjoint.
    assert_close(levels.hydrostatic, GAS_CONSTANT * levels.compression.T)


def test_rest_is_steady_without_forcing():
    model = HeldSuarez(forcing=0.0)
    state = torch.zeros(1, 25, 32, 64, dtype=torch.float64)
    state[:, 0] = 98765.0
    state[:, 1:9] = torch.linspace(210, 290, 8).double()[:, None, None]
    assert_close(model(state, 5 * 24.0), state, rtol=1e-11, atol=1e-8)


def test_fastest_mode_is_the_lamb_wave():
    step = HeldSuarez(num_layers=24)._steps[0]
    implicit = (1 / step.implicit - 1) / step.wave.clamp(min=1e-30)
    speed = (implicit[5] / (step.interval / 2)).max().sqrt()
    exact = math.sqrt(GAS_CONSTANT * REFERENCE_TEMPERATURE / (1 - KAPPA))
    assert speed.item() == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize(("time_step", "mode"), [(900.0, 0), (3600.0, 0), (3600.0, 1)])
def test_gravity_waves_have_the_frequency_of_the_semi_implicit_scheme(time_step, mode):
    model = HeldSuarez(
        forcing=0.0, time_step=time_step, time_filter=0.0, diffusion_seconds=math.inf
    )
    model.planetary.zero_()
    levels = model.levels
    heating = KAPPA * REFERENCE_TEMPERATURE * levels.compression
    surface = GAS_CONSTANT * REFERENCE_TEMPERATURE * levels.thickness
    squares, vectors = torch.linalg.eig((heating @ levels.hydrostatic + surface).T)
    index = squares.real.argsort(descending=True)[mode]
    speed, divergence = squares.real[index].sqrt(), vectors[:, index].real
    order, degree = 3, 7
    spectral = torch.zeros(2, 22, 22, 25, dtype=torch.float64)
    start = 1e-6 * torch.cat((divergence @ heating, divergence.sum()[None] / 8))
    spectral[0, order, degree, 16:] = start
    later = model.integrate(spectral, round(6 * 3600 / time_step))[0, order, degree, 16:]
    frequency = math.sqrt(degree * (degree + 1)) / EARTH_RADIUS_M * speed.item()
    phase = 6 * 3600 / time_step * math.atan(frequency * time_step)
    assert_close(later, start * math.cos(phase), rtol=0, atol=1e-5 * start.abs().max().item())


def test_forcing_follows_held_and_suarez():
    latitude = torch.tensor([0.0, 45.0, 90.0]).double().deg2rad()
    layers = torch.tensor([1.0, 0.625, math.exp(-3)]).double()
    target = equilibrium_temperature(torch.tensor(0.8).double().log(), layers / 0.8, latitude)
    assert_close(target[:, 0], torch.tensor([315.0, 285.0, 255.0]).double())
    exact = (315 - 10 * math.log(0.625)) * 0.625**KAPPA
    assert target[0, 1].item() == pytest.approx(exact)
    assert (target[:, 2] == 200).all()
    sigma = torch.tensor([0.3, 0.7, 0.85, 1.0]).double()
    assert_close(friction_rates(sigma) * DAY, torch.tensor([0, 0, 0.5, 1]).double())
    equator, pole = (relaxation_rates(sigma, lat) * DAY for lat in latitude[[0, 2]])
    assert_close(equator, torch.tensor([1 / 40, 1 / 40, (1 / 40 + 1 / 4) / 2, 1 / 4]).double())
    assert_close(pole, torch.full((4,), 1 / 40).double())


def test_temperature_relaxes_to_equilibrium():
    model = HeldSuarez()
    state = model.initial_state(1, seed=0).double()
    state[:, 1:9] = REFERENCE_TEMPERATURE
    gained = model(state, 1.0)[0, 1:9] - REFERENCE_TEMPERATURE
    latitude = model.grid.latitude.deg2rad()
    target = equilibrium_temperature(torch.zeros(1), model.levels.centers, latitude)  # (H, L)
    rate = relaxation_rates(model.levels.centers, latitude[:, None])
    expected = (rate * (target - REFERENCE_TEMPERATURE) * 3600).T
    assert_close(gained.mean(-1), expected, rtol=0.1, atol=0.05)


def test_mass_is_kept(weather):
    model, state = weather
    change = mean(model, model(state, 5 * 24.0)[:, 0]) / mean(model, state[:, 0]) - 1
    assert change.abs().max() < 1e-12


def total_energy(model, state):
    """Return internal and kinetic energy, J m-2 times gravity, per member."""
    pressure, temperature, u, v = parts(model, state)
    energy = GAS_CONSTANT / KAPPA * temperature + (u.square() + v.square()) / 2
    return mean(model, pressure * energy.mean(1))


def test_energy_is_conserved_without_forcing(weather):
    _, state = weather
    bare = HeldSuarez(
        **SMALL | {"time_step": 900.0}, forcing=0.0, time_filter=0.0, diffusion_seconds=math.inf
    )
    pressure, _, u, v = parts(bare, state)
    kinetic = mean(bare, pressure * (u.square() + v.square()).mean(1) / 2)
    change = total_energy(bare, bare(state, 24.0)) - total_energy(bare, state)
    assert (change.abs() / kinetic).max() < 0.02


def angular_momentum(model, state):
    """Return the axial angular momentum times gravity over area, and the torque of friction."""
    pressure, _, u, _ = parts(model, state)
    arm = EARTH_RADIUS_M * model.grid.latitude.deg2rad().cos()[:, None]
    relative = pressure * (u * arm).mean(1)
    planetary = pressure * ROTATION * arm.square()
    friction = friction_rates(model.levels.centers)[:, None, None]
    torque = -mean(model, pressure * (friction * u * arm).mean(1))
    return mean(model, relative + planetary), torque


def test_angular_momentum_changes_by_the_torque_of_friction(weather):
    model, state = weather
    before, first_torque = angular_momentum(model, state)
    middle = model(state, 12.0)
    _, middle_torque = angular_momentum(model, middle)
    after, last_torque = angular_momentum(model, model(middle, 12.0))
    expected = (first_torque + 4 * middle_torque + last_torque) / 6 * DAY
    kinetic_part = mean(model, state[:, 0] * 10 * EARTH_RADIUS_M)  # of 10 m/s everywhere
    assert ((after - before - expected).abs() / kinetic_part).max() < 2e-3
    bare = HeldSuarez(**SMALL, forcing=0.0)
    unchanged, _ = angular_momentum(bare, bare(state, 24.0))
    assert ((unchanged - before).abs() / kinetic_part).max() < 2e-3


def test_a_day_equals_four_calls_and_members_do_not_touch(weather):
    model, state = weather
    state = state.float()
    stepped = state
    for _ in range(4):
        stepped = model(stepped, 6.0)
    assert torch.equal(model(state, 24.0), stepped)
    single = torch.cat([model(member[None], 24.0) for member in state])
    assert_close(single, stepped, rtol=1e-5, atol=1e-3)
    changed = state.clone()
    changed[0] = state[2]
    assert torch.equal(model(changed, 6.0)[1:], model(state, 6.0)[1:])


def test_large_batches_run_in_blocks(weather):
    model, state = weather
    many = state.repeat(5, 1, 1, 1).float()
    assert len(many) > model.members_at_once
    later = model(many, 6.0)
    assert later.shape == many.shape
    assert_close(later, model(state.float(), 6.0).repeat(5, 1, 1, 1), rtol=1e-5, atol=1e-3)


def test_initial_states():
    model = HeldSuarez()
    state = model.initial_state(3, seed=7)
    assert (state.shape, state.dtype) == ((3, 25, 32, 64), torch.float32)
    assert (model.channels.num_channels, model.channels.labels[:2]) == (25, ("sp", "t1"))
    assert (state[:, 9:] == 0).all()
    assert_close(state[:, 0], torch.full((3, 32, 64), 1e5))
    noise = state[:, 1:9].double() - REFERENCE_TEMPERATURE
    assert_close(
        mean(model, noise.square()).sqrt(), torch.full((3, 8), 0.5).double(), rtol=1e-3, atol=0
    )
    assert not torch.equal(state[0], state[1])
    assert torch.equal(model.initial_state(2, seed=7), state[:2])


def test_gradients_reach_the_initial_state(weather):
    model, state = weather
    start = state[:1].clone().requires_grad_()
    model(start, 6.0)[0, 8, 6, 8].backward()
    place = (0, 7, 7, 6)
    moved = state[:1].clone()
    moved[place] += 1e-3
    numeric = (model(moved, 6.0) - model(state[:1], 6.0))[0, 8, 6, 8] / 1e-3
    assert start.grad[place].item() == pytest.approx(numeric.item(), rel=1e-3)


def test_bad_arguments_are_refused(refused):
    for words, wrong in (
        ("diffusion_seconds", {"diffusion_seconds": 0.0}),
        ("num_layers", {"num_layers": 1}),
        ("divide 21600", {"time_step": 5000.0}),
    ):
        refused(words, HeldSuarez, **wrong, error=ValueError)


@pytest.fixture(scope="module")
def independent_run(real):
    """Ten days of six-hourly states (40, 25, 32, 64) of another dynamical core, dinosaur."""
    with np.load(real / "held_suarez_T21L8_10days_6h.npz") as data:
        fields = [
            torch.tensor(data[name] * float(data[f"{name}_scale"]) + float(data[f"{name}_offset"]))
            for name in ("ps", "T", "u", "v")
        ]
    fields[0] = fields[0][:, None]
    return torch.cat(fields, dim=1).double().flip(-2)


def test_forecasts_follow_an_independent_core(independent_run):
    model = HeldSuarez()
    forecast = independent_run[0:25:8]
    for hours, limit in ((6, 0.25), (24, 0.6)):
        forecast = model(independent_run[0:25:8], float(hours))
        truth = independent_run[hours // 6 : 25 + hours // 6 : 8]
        error = mean(model, (forecast - truth)[:, 9:17].square()).mean().sqrt()
        moved = mean(model, (truth - independent_run[0:25:8])[:, 9:17].square()).mean().sqrt()
        assert error < limit
        assert error < 0.1 * moved


def zonal_statistics(model, state):
    """Return zonal means and eddy moments (N, 9, L, H) in the order of the golden file."""
    pressure, temperature, u, v = parts(model, state.double())

    def eddy(field):
        return field - field.mean(-1, keepdim=True)

    moments = (
        (u, 1),
        (v, 1),
        (temperature, 1),
        (eddy(u), eddy(u)),
        (eddy(v), eddy(v)),
        (eddy(temperature), eddy(temperature)),
        (eddy(u), eddy(v)),
        (eddy(v), eddy(temperature)),
        (pressure[:, None].expand_as(u), 1),
    )
    return torch.stack([(a * b).mean(-1) for a, b in moments], dim=1)


def norm(field):
    """Return the root mean square of (L, H) with the weights of Gaussian latitudes."""
    _, weights = gaussian_nodes(field.shape[-1])
    return (field.square() @ weights / 2).mean().sqrt().item()


@pytest.mark.slow
def test_climate_equals_that_of_an_independent_core():
    with np.load(GOLDEN) as golden:
        expected = torch.tensor(golden["stats"]).double().flip(-1)  # to north to south
        names = golden["stat_names"].tolist()
    model = HeldSuarez()
    total = torch.zeros_like(expected)
    with torch.no_grad():
        state = model(model.initial_state(2, seed=1), 120 * 24.0)
        for _ in range(240):
            state = model(state, 24.0)
            total += zonal_statistics(model, state).mean(0) / 240
    difference = {name: norm(total[i] - expected[i]) for i, name in enumerate(names)}
    share = {name: difference[name] / norm(expected[i]) for i, name in enumerate(names)}
    assert difference["u"] < 1.5
    assert difference["T"] < 1.5
    assert difference["ps"] < 200
    eddies = ["u_eddy2", "v_eddy2", "T_eddy2", "u_eddy_v_eddy", "v_eddy_T_eddy"]
    assert {name: share[name] for name in eddies if share[name] > 0.25} == {}
    assert total[0].max().item() == pytest.approx(expected[0].max().item(), abs=3)
