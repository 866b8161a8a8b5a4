import pytest
import torch
from torch.testing import assert_close

from weather.baselines.covariance import DenseCovariance
from weather.baselines.minimizer import DenseControl, Timed, WindowCost
from weather.baselines.optimal_interpolation import OptimalInterpolation
from weather.baselines.spectral_covariance import SpectralCovariance
from weather.baselines.variational import FourDVar, ThreeDVar, gradient_error
from weather.cycle import Cycle
from weather.models.shallow_water.model import ShallowWater
from weather.observations.gridded import GriddedObservations
from weather.observations.simulated import bernoulli_network, observe

SD = torch.tensor([10.0, 1.0, 1.0])


@pytest.fixture(scope="module")
def model():
    return ShallowWater(truncation=12, num_latitudes=16, num_longitudes=32, stirring=5e-10)


@pytest.fixture(scope="module")
def b(model):
    deviation = torch.tensor([40.0, 4.0, 4.0])
    return SpectralCovariance.univariate(
        model.transform, model.channels, deviation, length_km=3000.0
    )


@pytest.fixture(scope="module")
def twin(model, b):
    """Truth (3, 2, 3, 16, 32) every 6 hours, a background (2, 1, ...) with errors of B, reports."""
    with torch.no_grad():
        truth = [model(model.initial_state(2, seed=1).double(), 240.0)]
        truth += [model(truth[0], 6.0), model(truth[0], 12.0)]
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(2, b.num_controls, generator=draw, dtype=torch.float64)
    background = truth[0] + b.increment(noise).view_as(truth[0])
    networks = torch.stack([bernoulli_network(model.grid, 0.2, seed=s) for s in (0, 1)])[:, None]
    reports = [observe(state, networks, SD, generator=draw) for state in truth]
    return torch.stack(truth), background[:, None], reports


def relative(found, expected, background):
    return ((found - expected).norm() / (expected - background).norm()).item()


def test_the_gradient_through_the_model_is_that_of_finite_differences(model, b, twin):
    _, background, reports = twin
    timed = [Timed(6.0 * k, fields) for k, fields in enumerate(reports)]
    cost = WindowCost(b, 0.5, background[:, 0], timed, model)
    draw = torch.Generator().manual_seed(3)
    control = torch.randn(b.num_controls, generator=draw, dtype=torch.float64)
    assert gradient_error(cost, control, step=1e-2) <= 1e-6
    still = WindowCost(b, 0.5, background[:, 0], timed)
    rows = torch.arange(2)
    two = control.expand(2, -1)
    assert (cost(two, rows) - still(two, rows)).abs().min() > 1.0  # the model matters
    assert_close(cost(two[:1], rows[1:]), cost(two, rows)[1:])


def test_a_wrong_gradient_is_found(model, b, twin):
    """A model that hides part of its dependence fails the test."""
    _, background, reports = twin

    def cut(states, hours):
        later = model(states, hours)
        return later.detach() + 0.9 * (states - states.detach())

    cost = WindowCost(b, 0.5, background[:, 0], [Timed(6.0, reports[1])], cut)
    assert gradient_error(cost, torch.zeros(b.num_controls).double(), step=1e-2) > 1e-2


def test_a_window_of_zero_hours_is_three_d_var(model, b, twin):
    _, background, reports = twin
    expected = ThreeDVar(b, scale=0.5).analyse(background, reports[0])
    none = FourDVar(b, model, window_hours=0.0, scale=0.5, tolerance=1e-8, max_iterations=500)
    for _ in range(2):  # also when it has a history
        assert relative(none.analyse(background, reports[0]), expected, background) <= 1e-6
    first = FourDVar(b, model, window_hours=12.0, scale=0.5, tolerance=1e-8, max_iterations=500)
    assert relative(first.analyse(background, reports[0]), expected, background) <= 1e-6


def rotating(columns=2, growth=0.8):
    """A linear model: 3 hours move everything by one column, with growth or decay."""

    def forecast(states, hours):
        steps = round(hours / 3)
        return growth**steps * states.roll(steps * columns, -1)

    return forecast


def linear_problem():
    draw = torch.Generator().manual_seed(5)
    states = torch.randn(5, 1, 4, 6, generator=draw, dtype=torch.float64)
    matrix = torch.eye(24).double() + torch.randn(24, 24, generator=draw, dtype=torch.float64) * 0.3
    b = matrix @ matrix.T
    reports = [
        observe(state[None], torch.rand(1, 4, 6, generator=draw) < 0.4, torch.tensor([0.5]))
        for state in states[:4]
    ]
    return states[4][None, None], b, reports


def propagator(forecast, hours):
    units = torch.eye(24, dtype=torch.float64).view(24, 1, 4, 6)
    return forecast(units, hours).flatten(1).T


def test_a_linear_model_gives_the_propagated_covariance():
    """One time of observations 6 hours after the start: the Kalman analysis with A B A'."""
    background, b, reports = linear_problem()
    model = rotating()
    method = FourDVar(DenseControl(b), model, tolerance=1e-10, max_iterations=500)
    first = method.analyse(background, reports[0])
    later = model(first[0], 6.0)[None]
    a = propagator(model, 6.0)
    expected = OptimalInterpolation(DenseCovariance(a @ b @ a.T)).analyse(later, reports[1])
    found = method.analyse(later, reports[1])
    assert relative(found, expected, later) <= 1e-6
    static = OptimalInterpolation(DenseCovariance(b)).analyse(later, reports[1])
    assert relative(static, expected, later) > 0.1


def test_a_window_of_two_cycles_uses_every_observation_after_its_start_once():
    background, b, reports = linear_problem()
    model = rotating()
    method = FourDVar(
        DenseControl(b), model, window_hours=12.0, tolerance=1e-10, max_iterations=500
    )
    steps = list(Cycle(model, method).run(background, reports[:3]))
    start = steps[0].analysis.flatten()
    rows, residuals, errors = [], [], []
    for hours, fields in ((6.0, reports[1]), (12.0, reports[2])):
        seen = fields.mask.flatten()
        h = propagator(model, hours)[seen]
        rows.append(h)
        residuals.append(fields.values.flatten()[seen] - h @ start)
        errors.append(fields.errors.flatten()[seen])
    h, d, r = torch.cat(rows), torch.cat(residuals), torch.cat(errors).square().diag()
    increment = b @ h.T @ torch.linalg.solve(h @ b @ h.T + r, d)
    expected = propagator(model, 12.0) @ (start + increment)
    found = steps[2].analysis.flatten()
    assert ((found - expected).norm() / expected.norm()).item() <= 1e-6


def test_a_replaced_background_does_not_use_the_old_analysis():
    background, b, reports = linear_problem()
    model, control = rotating(), DenseControl(b)
    two = background.expand(2, -1, -1, -1, -1).clone()
    fields = [GriddedObservations(*(part.expand(2, -1, -1, -1) for part in r)) for r in reports]
    method = FourDVar(control, model, tolerance=1e-10, max_iterations=500)
    later = model(method.analyse(two, fields[0])[:, 0], 6.0)[:, None]
    later[1] += 3.0  # the caller has restarted this timeline
    found = method.analyse(later, fields[1])
    expected = ThreeDVar(control).analyse(later, fields[1])
    assert relative(found[1], expected[1], later[1]) <= 1e-6
    assert relative(found[0], expected[0], later[0]) > 0.01


@pytest.mark.fault("weather outage")
def test_without_observations_the_forecast_stays_exactly(model, b, twin):
    _, background, reports = twin
    method = FourDVar(b, model, window_hours=12.0, scale=0.5, tolerance=1e-2)
    nothing = reports[0].withhold(torch.zeros(()).bool())
    steps = list(Cycle(model, method).run(background.float(), [reports[0], nothing, nothing]))
    for step in steps[1:]:
        assert torch.equal(step.analysis, step.background)
    assert not torch.equal(steps[0].analysis, steps[0].background)
    lost = background.clone()
    lost[0, 0, 0, 0, 0] = torch.nan
    found = method.analyse(lost, reports[0])
    assert torch.equal(found[0].nan_to_num(7.0), lost[0].nan_to_num(7.0))
    assert found[1].isfinite().all()


def test_in_a_twin_the_window_helps(model, b, twin):
    truth, background, reports = twin
    one = [GriddedObservations(*(part[:1] for part in fields)) for fields in reports]
    methods = {
        "3d": ThreeDVar(b, tolerance=1e-2),
        "4d": FourDVar(b, model, window_hours=12.0, tolerance=1e-2),
    }
    error = {}
    for name, method in methods.items():
        last = list(Cycle(model, method).run(background[:1], one))[-1]
        error[name] = (last.analysis[0, 0] - truth[-1][0])[0].square().mean().sqrt().item()
        ahead = (last.background[0, 0] - truth[-1][0])[0].square().mean().sqrt().item()
        assert error[name] < ahead
    assert error["4d"] < 0.95 * error["3d"]


def test_wrong_arguments_are_refused(b):
    for hours, cycle in ((4.0, 6.0), (-6.0, 6.0), (6.0, 0.0)):
        with pytest.raises(ValueError, match="window_hours must be a multiple of a cycle"):
            FourDVar(b, rotating(), window_hours=hours, hours=cycle)
    with pytest.raises(ValueError, match="scale must be positive"):
        FourDVar(b, rotating(), scale=-1.0)
