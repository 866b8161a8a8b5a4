"""Spectral covariances, and the variational methods that use them."""

import pytest
import torch
from torch.testing import assert_close

from tests.weather.baselines.spectra import (
    DenseControl,
    correlation_spectrum,
    gradient_error,
    univariate,
)
from weather import Cycle, GriddedObservations, OptimalInterpolation
from weather.baselines import FourDVar, ThreeDVar
from weather.baselines.covariance import gaspari_cohn
from weather.baselines.minimizer import Timed, WindowCost, adjoint_increment
from weather.baselines.spectral_covariance import LinearBalance, SpectralCovariance
from weather.grid import great_circle_km
from weather.models.leapfrog import GRAVITY, ROTATION
from weather.models.shallow_water.model import ShallowWater
from weather.observations.simulated import bernoulli_network, observe
from weather.spherical import EARTH_RADIUS_M, SphericalTransform
from weather.state import SHALLOW_WATER, ChannelSpec

LARGE = SphericalTransform(10, 16, 32)
TRANSFORM = SphericalTransform(6, 10, 20)
GRID = LARGE.grid
SCALAR = ChannelSpec(surface=("height",))
POINTS = 16 * 32


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def variance_of(b):
    """The diagonal of B (n,), in blocks."""
    return torch.cat([b.block(rows, rows).diagonal() for rows in torch.arange(b.size).split(256)])


def legendre(cosine, truncation):
    """Polynomials P_0 to P_T by the recurrence of Bonnet."""
    found = [torch.ones_like(cosine), cosine]
    for n in range(1, truncation):
        found.append(((2 * n + 1) * cosine * found[n] - n * found[n - 1]) / (n + 1))
    return torch.stack(found)


def test_a_scalar_has_the_covariance_of_its_spectrum():
    """Addition theorem: B(x, y) = sum over l of (2 l + 1) S_l P_l(cos distance)."""
    spectrum = torch.rand(11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    b = SpectralCovariance(LARGE, SCALAR, spectrum[:, None, None])
    rows = torch.tensor([0, 37, 300, 511])
    lat, lon = GRID.latitude.repeat_interleave(32), GRID.longitude.repeat(16)
    angle = great_circle_km(lat[rows, None], lon[rows, None], lat, lon) / 6371.0
    terms = legendre(angle.cos(), 10)
    expected = torch.einsum("l,lrp->rp", (2 * torch.arange(11) + 1) * spectrum, terms)
    assert_close(b.block(rows), expected, rtol=0, atol=1e-11)
    assert_close(b.block(rows, rows), expected[:, rows], rtol=0, atol=1e-11)
    total = ((2 * torch.arange(11) + 1) * spectrum).sum().expand(POINTS)
    assert_close(variance_of(b), total, rtol=1e-12, atol=0)


def test_winds_have_the_stated_deviation_and_no_preferred_direction():
    b = univariate(LARGE, SHALLOW_WATER, torch.tensor([20.0, 3.0, 3.0]), length_km=3000.0)
    variance = variance_of(b).view(3, POINTS)
    expected = torch.tensor([400.0, 9.0, 9.0], dtype=torch.float64)[:, None]
    assert_close(variance, expected.expand(3, POINTS))


def random_spectra(seed=2):
    root = random(11, 3, 3, seed=seed) * torch.linspace(1, 0.1, 11).double()[:, None, None]
    root[0, 1:] = 0  # a wind has no mean vorticity or divergence
    spectra = root @ root.mT
    scale = torch.tensor([30.0, 1e-5, 3e-6], dtype=torch.float64)
    return spectra * scale * scale[:, None]


@pytest.mark.parametrize("balance", [None, torch.linspace(0.5, 1.0, 11, dtype=torch.float64)])
def test_the_adjoint_of_u(balance):
    b = SpectralCovariance(LARGE, SHALLOW_WATER, random_spectra(), balance=balance)
    v, x = random(2, b.num_controls, seed=3), random(2, b.size, seed=4)
    assert_close(
        (b.increment(v) * x).sum(1), (v * adjoint_increment(b, x)).sum(1), rtol=1e-12, atol=0
    )
    rows = torch.tensor([5, POINTS + 70, 2 * POINTS + 300])
    assert_close(b.block(rows, rows), b.block(rows, rows).T)


def test_samples_drawn_from_it_give_the_spectra_back():
    balance = torch.linspace(0.9, 0.4, 7, dtype=torch.float64)
    spectra = random_spectra()[:7]
    spectra[:, 0, 1:] = spectra[:, 1:, 0] = 0  # what is left of the height knows no wind
    truth = SpectralCovariance(TRANSFORM, SHALLOW_WATER, spectra, balance=balance)
    with torch.no_grad():
        samples = truth.increment(random(2000, truth.num_controls, seed=5)).view(2000, 3, 10, 20)
    found = SpectralCovariance.from_samples(samples, TRANSFORM, SHALLOW_WATER, balanced=True)
    assert_close(found.balance[1:], balance[1:], rtol=0.05, atol=0)
    variance = variance_of(truth)
    assert_close(variance_of(found), variance, rtol=0.1, atol=0)
    rows = torch.tensor([70, 270, 470])
    sample = samples.flatten(1)
    expected = sample[:, rows].T @ sample / 2000
    deviation = variance.sqrt()
    assert ((found.block(rows) - expected) / deviation[rows, None] / deviation).abs().max() < 0.1
    free = SpectralCovariance.from_samples(samples, TRANSFORM, SHALLOW_WATER)
    height_and_wind = free.block(torch.tensor([70]))[0, 200:]
    assert found.block(torch.tensor([70]))[0, 200:].abs().max() > 3 * height_and_wind.abs().max()


def test_linear_balance_in_closed_form():
    """Solid rotation w: g dh/dlat = -f u a gives h = -w a**2 omega sin**2 / g, up to a constant."""
    rate = 1e-6
    sine = GRID.latitude.deg2rad().sin()[:, None].expand(16, 32)
    vorticity = LARGE.analysis(LARGE.pack_grid(2 * rate * sine[None]))
    height = LARGE.synthesis(LinearBalance(LARGE).height(vorticity))
    expected = -rate * EARTH_RADIUS_M**2 * ROTATION * (sine.square() - 1 / 3) / GRAVITY
    assert_close(LARGE.unpack_grid(height, torch.Size([1]))[0], expected, rtol=1e-10, atol=1e-9)


def test_the_wind_of_one_height_observation_goes_round_it():
    """In the north, high pressure has westerlies on its northern side; south of the equator not."""
    spectra = torch.zeros(11, 3, 3, dtype=torch.float64)
    spectra[:, 0, 0] = correlation_spectrum(lambda km: gaspari_cohn(km / 3000.0), 10)
    spectra[:, 1, 1] = spectra[:, 0, 0] * LARGE.laplacian.square() * 1e13
    balance = torch.ones(11, dtype=torch.float64)
    balanced = SpectralCovariance(LARGE, SHALLOW_WATER, spectra, balance=balance)
    for row, sign in ((4, 1), (11, -1)):  # 45 degrees north, and south
        line = balanced.block(torch.tensor([row * 32 + 10])).view(3, 16, 32)
        assert line[0, row, 10] == line[0].max()
        assert line[1, row + 2 * sign, 10] < 0 < line[1, row - 2 * sign, 10]
        assert sign * line[2, row, 12] < 0 < sign * line[2, row, 8]


SD = torch.tensor([20.0, 3.0, 3.0], dtype=torch.float64)


def spectral():
    return univariate(TRANSFORM, SHALLOW_WATER, SD, length_km=3000.0)


def spectral_problem(timelines=2, members=1, dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(timelines * (1 + members), 3, 10, 20, generator=draw, dtype=dtype)
    states = noise * SD[:, None, None].to(dtype) + 100
    truth, background = states[:timelines], states[timelines:].view(timelines, members, 3, 10, 20)
    networks = torch.stack(
        [bernoulli_network(TRANSFORM.grid, 0.1, seed=s) for s in range(timelines)]
    )
    return background, observe(truth, networks[:, None], SD / 5, generator=draw)


def relative(found, expected, background):
    return ((found - expected).norm() / (expected - background).norm()).item()


def test_golden(golden_filter):
    """The minimiser is the analysis of optimal interpolation with the same B."""
    vectors, _, observations = golden_filter
    background = vectors["xb"].view(1, 1, 1, 6, 10)
    analysis = ThreeDVar(DenseControl(vectors["B"])).analyze(background, observations)
    expected = vectors["oi_xa"].view_as(background)
    assert relative(analysis, expected, background) <= 1e-6
    assert_close(analysis, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_the_spectral_minimiser_is_optimal_interpolation(scale):
    background, observations = spectral_problem()
    b = spectral()
    analysis = ThreeDVar(b, scale=scale).analyze(background, observations)
    expected = OptimalInterpolation(b, scale=scale).analyze(background, observations)
    assert relative(analysis, expected, background) <= 1e-6
    assert relative(background, expected, background) == 1.0


def test_timelines_and_members_are_independent():
    background, observations = spectral_problem(members=2)
    together = ThreeDVar(spectral(), members=2, tolerance=1e-3).analyze(background, observations)
    alone = ThreeDVar(spectral(), tolerance=1e-3).analyze(
        background[1:, 1:], GriddedObservations(*(part[1:] for part in observations))
    )
    assert relative(together[1:, 1:], alone, background[1:, 1:]) <= 1e-9


@pytest.mark.fault("weather outage")
def test_what_observes_nothing_or_is_lost_stays_exactly():
    background, observations = spectral_problem(timelines=3)
    keep = torch.tensor([True, False, True])[:, None, None, None]
    background[2, 0, 0, 0, 0] = torch.nan
    method = ThreeDVar(spectral(), tolerance=1e-3)
    analysis = method.analyze(background, observations.withhold(keep))
    assert torch.equal(analysis[1:].nan_to_num(7.0), background[1:].nan_to_num(7.0))
    assert analysis[0].isfinite().all()
    assert not torch.equal(analysis[0], background[0])
    nothing = observations.withhold(torch.zeros(()).bool())
    found = method.analyze(background[:2], GriddedObservations(*(p[:2] for p in nothing)))
    assert torch.equal(found, background[:2])
    assert found.data_ptr() != background.data_ptr()


def test_single_precision_is_kept_and_close():
    background, observations = spectral_problem()
    b = spectral()
    exact = ThreeDVar(b).analyze(background, observations)
    found = ThreeDVar(b).analyze(background.float(), observations.to(torch.float32))
    assert found.dtype == torch.float32
    assert_close(found.double(), exact, rtol=0, atol=1e-3)


TWIN_SD = torch.tensor([10.0, 1.0, 1.0])


@pytest.fixture(scope="module")
def model():
    return ShallowWater(truncation=12, num_latitudes=16, num_longitudes=32, stirring=5e-10)


@pytest.fixture(scope="module")
def b(model):
    deviation = torch.tensor([40.0, 4.0, 4.0])
    return univariate(model.transform, model.channels, deviation, length_km=3000.0)


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
    reports = [observe(state, networks, TWIN_SD, generator=draw) for state in truth]
    return torch.stack(truth), background[:, None], reports


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


def test_a_window_of_zero_hours_is_three_d_var(model, b, twin):
    _, background, reports = twin
    expected = ThreeDVar(b, scale=0.5).analyze(background, reports[0])
    none = FourDVar(b, model, window_hours=0.0, scale=0.5, tolerance=1e-8, max_iterations=500)
    for _ in range(2):  # also when it has a history
        assert relative(none.analyze(background, reports[0]), expected, background) <= 1e-6
    first = FourDVar(b, model, window_hours=12.0, scale=0.5, tolerance=1e-8, max_iterations=500)
    assert relative(first.analyze(background, reports[0]), expected, background) <= 1e-6


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
    return forecast(torch.eye(24, dtype=torch.float64).view(24, 1, 4, 6), hours).flatten(1).T


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
    assert ((steps[2].analysis.flatten() - expected).norm() / expected.norm()).item() <= 1e-6


def test_a_replaced_background_does_not_use_the_old_analysis():
    background, b, reports = linear_problem()
    model, control = rotating(), DenseControl(b)
    two = background.expand(2, -1, -1, -1, -1).clone()
    fields = [GriddedObservations(*(part.expand(2, -1, -1, -1) for part in r)) for r in reports]
    method = FourDVar(control, model, tolerance=1e-10, max_iterations=500)
    later = model(method.analyze(two, fields[0])[:, 0], 6.0)[:, None]
    later[1] += 3.0  # the caller has restarted this timeline
    found = method.analyze(later, fields[1])
    expected = ThreeDVar(control).analyze(later, fields[1])
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
    found = method.analyze(lost, reports[0])
    assert torch.equal(found[0].nan_to_num(7.0), lost[0].nan_to_num(7.0))
    assert found[1].isfinite().all()


WIND = ChannelSpec(("u_component_of_wind",))
DENSE = DenseControl(torch.eye(60).double())


def three(**options):
    return ThreeDVar(DENSE, **options)


def four(**options):
    return FourDVar(DENSE, rotating(), **options)


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (
            lambda: SpectralCovariance(LARGE, SHALLOW_WATER, torch.zeros(11, 2, 2)),
            r"expected spectra \(11, 3, 3\)",
        ),
        (
            lambda: SpectralCovariance(LARGE, WIND, torch.zeros(11, 1, 1)),
            "u_component_of_wind and v_component_of_wind belong",
        ),
        (
            lambda: SpectralCovariance(
                LARGE, SCALAR, torch.zeros(11, 1, 1), balance=torch.ones(11)
            ),
            "linear balance needs the channels height and one wind",
        ),
        (lambda: three(scale=0), "scale must be positive, got 0"),
        (lambda: three(tolerance=1), "tolerance must lie between 0 and 1, got 1"),
        (lambda: three(max_iterations=0), "max_iterations must be at least 1, got 0"),
        (lambda: three().analyze(*spectral_problem()), r"C\*H\*W = 60"),
        (lambda: four(window_hours=4.0), "window_hours must be a multiple of a cycle"),
        (lambda: four(window_hours=-6.0), "window_hours must be a multiple of a cycle"),
        (lambda: four(hours=0.0), "window_hours must be a multiple of a cycle"),
        (lambda: four(scale=-1.0), "scale must be positive"),
    ],
)
def test_wrong_arguments_are_refused(refused, words):
    with pytest.raises(ValueError, match=words):
        refused()
