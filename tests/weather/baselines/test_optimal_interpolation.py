from collections import Counter

import pytest
import torch
from torch.testing import assert_close

from weather.baselines.covariance import DenseCovariance, HomogeneousCovariance, SampleCovariance
from weather.baselines.minimizer import minimize_each
from weather.baselines.optimal_interpolation import (
    DampedInterpolation,
    IterativeInterpolation,
    OptimalInterpolation,
)
from weather.grid import Grid, gaussian_grid, regular_grid
from weather.observations.gridded import GriddedObservations
from weather.observations.simulated import observe


def covariance(channels=2, seed=3):
    grid = gaussian_grid(6, 12)
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(40, channels, 6, 12, generator=generator, dtype=torch.float64)
    return SampleCovariance(samples, grid, localization_km=3000.0)


def gain_of(method, errors):
    """The gain (n, p): the analyses of one unit observation each over a background of zero."""
    seen = errors.flatten().isfinite().nonzero().flatten()
    values = torch.zeros(len(seen), errors.numel(), dtype=torch.float64)
    values[torch.arange(len(seen)), seen] = 1.0
    shape = (len(seen), *errors.shape)
    observations = GriddedObservations(values.view(shape), errors.expand(shape))
    return method.analyze(torch.zeros(shape).double()[:, None], observations).flatten(1).T


def variance_of(method, gain, errors):
    """The error variance of the analysis (n,), the diagonal of B - K H B."""
    cross = method.covariance.block(errors.flatten().isfinite().nonzero().flatten())
    rows = torch.arange(len(gain))
    return method.covariance.block(rows, rows).diagonal() - (gain * cross.T).sum(1)


def test_golden(golden_filter):
    vectors, _, observations = golden_filter
    method = OptimalInterpolation(DenseCovariance(vectors["B"]))
    analysis = method.analyze(vectors["xb"].view(1, 1, 1, 6, 10), observations)
    exact = {"rtol": 0, "atol": 1e-9}
    assert_close(analysis.flatten(), vectors["oi_xa"], **exact)
    errors = observations.errors[0]
    order = vectors["obs_index"].argsort()
    gain = gain_of(method, errors)
    assert_close(gain, vectors["oi_K"][:, order], **exact)
    assert_close(variance_of(method, gain, errors), vectors["oi_A_diag"], **exact)


def test_without_errors_the_observations_are_reproduced(problem):
    background, observations = problem()
    exact = observations._replace(errors=observations.errors.where(~observations.mask, 0.0))
    analysis = OptimalInterpolation(covariance()).analyze(background, exact).squeeze(1)
    mask = observations.mask
    assert_close(analysis[mask], observations.values[mask], rtol=0, atol=1e-9)
    assert not torch.equal(analysis[~mask], background.squeeze(1)[~mask])


def test_without_observations_the_background_is_kept_exactly(problem):
    background, observations = problem()
    nothing = observations.withhold(torch.zeros(()).bool())
    analysis = OptimalInterpolation(covariance()).analyze(background, nothing)
    assert torch.equal(analysis, background)
    assert analysis.data_ptr() != background.data_ptr()


def test_timelines_with_networks_of_their_own_are_independent(problem):
    background, observations = problem(timelines=3)
    method = OptimalInterpolation(covariance())
    together = method.analyze(background, observations)
    for line in range(3):
        one = GriddedObservations(*(part[line, None] for part in observations))
        alone = OptimalInterpolation(covariance()).analyze(background[line, None], one)
        assert_close(together[line, None], alone, rtol=0, atol=1e-12)
    assert torch.equal(method.analyze(background, observations), together)


def test_members_are_moved_by_the_same_gain(problem):
    background, observations = problem(members=3)
    together = OptimalInterpolation(covariance(), members=3).analyze(background, observations)
    alone = OptimalInterpolation(covariance()).analyze(background[:, 2:], observations)
    assert_close(together[:, 2:], alone, rtol=0, atol=1e-12)


def test_scale_multiplies_the_background_deviation(problem):
    background, observations = problem()
    scaled = OptimalInterpolation(covariance(), scale=0.5).analyze(background, observations)
    matrix = DenseCovariance(covariance().dense().matrix / 4)
    expected = OptimalInterpolation(matrix).analyze(background, observations)
    assert_close(scaled, expected, rtol=0, atol=1e-12)
    method = OptimalInterpolation(covariance())
    method.analyze(background, observations)
    method.scale = 0.5
    assert torch.equal(method.analyze(background, observations), scaled)


def test_little_memory_changes_only_the_speed(problem, monkeypatch):
    background, observations = problem()
    monkeypatch.setattr("weather.baselines.optimal_interpolation._STREAM_ROWS", 5)
    kept = OptimalInterpolation(covariance(), scale=0.7)
    streamed = OptimalInterpolation(covariance(), scale=0.7, cache_mib=1e-3)
    for _ in range(2):
        assert_close(
            streamed.analyze(background, observations),
            kept.analyze(background, observations),
            rtol=0,
            atol=1e-12,
        )


def test_float32_is_close_to_float64(problem):
    background, observations = problem()
    exact = OptimalInterpolation(covariance()).analyze(background, observations)
    rough = OptimalInterpolation(DenseCovariance(covariance().dense().matrix.float()))
    analysis = rough.analyze(background.float(), observations.to(torch.float32))
    assert analysis.dtype == torch.float32
    assert_close(analysis.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.fault("faults 7")
def test_one_missing_value_leaves_the_others(problem):
    background, observations = problem(density=1.0)
    values = observations.values.clone()
    values[0, 0, 2, 3] = torch.nan
    keep = torch.ones_like(observations.mask)
    keep[0, 0, 2, 3] = False
    method = OptimalInterpolation(covariance())
    found = method.analyze(background, GriddedObservations(values, observations.errors))
    assert_close(found, method.analyze(background, observations.withhold(keep)))
    assert found.isfinite().all()


@pytest.mark.fault("faults 7")
def test_another_covariance_has_factors_of_its_own(problem):
    background, observations = problem()
    method = OptimalInterpolation(covariance(seed=3))
    first = method.analyze(background, observations)
    method.covariance = covariance(seed=4)
    second = method.analyze(background, observations)
    assert_close(second, OptimalInterpolation(covariance(seed=4)).analyze(background, observations))
    assert not torch.equal(first, second)


GRID = regular_grid(9, 16, poles=True)
SHAPE = (3, *GRID.shape)
EQUAL = DenseCovariance(torch.ones(432, 432).double())  # all errors are one
UNEVEN = HomogeneousCovariance(
    torch.ones(1, 2, 3),
    torch.ones(1, 1),
    Grid(torch.tensor([10.0, -10.0]), torch.tensor([0.0, 90.0, 200.0])),
    length_km=500.0,
)


def draw(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def homogeneous():
    scale = torch.tensor([30.0, 1.0, 4.0])[:, None, None]
    samples = scale * torch.randn(12, *SHAPE, generator=draw(0))
    samples[:, 1] += samples[:, 0] / 50  # channels that vary together
    return HomogeneousCovariance.from_samples(samples, GRID, length_km=3000.0)


def problem(members=1):
    truth = torch.randn(2, *SHAPE, generator=draw(1)) * 20
    network = torch.rand(SHAPE, generator=draw(2)) < 0.3  # each channel at its own points
    seen = observe(truth, network, torch.tensor([3.0, 0.5, 1.0]), generator=draw(3))
    nothing = GriddedObservations.absent(SHAPE)
    observations = GriddedObservations.stack(
        [GriddedObservations(seen.values[0], seen.errors[0]), nothing]
    )
    return torch.randn(2, members, *SHAPE, generator=draw(4)) * 20, observations


@pytest.mark.parametrize("members", [1, 2])
def test_iterations_end_at_the_direct_solution(homogeneous, members):
    background, observations = problem(members)
    exact = OptimalInterpolation(homogeneous, scale=0.7, members=members)
    method = IterativeInterpolation(homogeneous, scale=0.7, members=members, tolerance=1e-10)
    expected, found = (one.analyze(background, observations) for one in (exact, method))
    moved = (expected - background)[0].abs().amax((0, 2, 3))
    assert ((found - expected)[0].abs().amax((0, 2, 3)) <= 1e-5 * moved).all()
    assert (moved > 0.5).all()
    assert torch.equal(found[1], background[1])  # no observation, no change


def test_a_looser_tolerance_ends_earlier_and_near(homogeneous, monkeypatch):
    calls, multiply = Counter(), IterativeInterpolation.multiply

    def counted(self, fields):
        calls[self.tolerance] += 1
        return multiply(self, fields)

    monkeypatch.setattr(IterativeInterpolation, "multiply", counted)
    background, observations = problem()
    methods = [IterativeInterpolation(homogeneous, tolerance=x) for x in (1e-8, 1e-2)]
    exact, near = (method.analyze(background, observations)[0] for method in methods)
    assert calls[1e-2] < calls[1e-8]
    moved = (exact - background[0]).square().mean().sqrt()
    assert (near - exact).square().mean().sqrt() < 0.05 * moved


def test_another_length_is_another_covariance(homogeneous):
    shorter = homogeneous.with_length(500.0)
    assert shorter.length_km == 500.0
    torch.testing.assert_close(shorter.deviation, homogeneous.deviation)
    assert shorter.block(torch.tensor([20]))[0, 21] < homogeneous.block(torch.tensor([20]))[0, 21]


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        (OptimalInterpolation, {"scale": 0.0}, "scale"),
        (OptimalInterpolation, {"covariance": DenseCovariance(torch.eye(360))}, "= 360"),
        (OptimalInterpolation, {"background": torch.zeros(1, 1, *SHAPE)}, "observations"),
        (OptimalInterpolation, {"covariance": EQUAL}, "not positive definite"),
        (IterativeInterpolation, {"scale": 0.0}, "scale must be positive"),
        (IterativeInterpolation, {"tolerance": 1.0}, "0 < tolerance < 1"),
        (IterativeInterpolation, {"max_iterations": 0}, "max_iterations >= 1"),
        (IterativeInterpolation, {"covariance": UNEVEN}, "equal steps"),
        (IterativeInterpolation, {"background": torch.zeros(1, 1, 2, 9, 16)}, "a background"),
    ],
)
def test_impossible_arguments_are_refused(homogeneous, method, options, words, refused):
    background, observations = problem()
    exact = observations._replace(errors=observations.errors.where(~observations.mask, 0.0))
    options = {"covariance": homogeneous, "background": background} | options
    background = options.pop("background")
    refused(words, lambda: method(**options).analyze(background, exact), error=ValueError)


def test_quadratic_rows_end_at_their_minimum_whatever_the_others_need():
    """Row n is |v|^2 / 2 + c_n |v - n|^2 / 2 with its minimum at c n / (1 + c)."""
    curvature = torch.tensor([1.0, 100.0, 1e4], dtype=torch.float64)
    target = torch.arange(1.0, 4.0, dtype=torch.float64)[:, None] * torch.ones(5).double()
    calls = []

    def costs(v, rows):
        calls.append(rows.tolist())
        pull = (v - target[rows]).square().sum(1)
        return 0.5 * v.square().sum(1) + 0.5 * curvature[rows] * pull

    found = minimize_each(costs, 3, 5, tolerance=1e-10, max_iterations=50)
    for minimum, c, t in zip(found, curvature, target, strict=True):
        assert_close(minimum.control, c * t / (1 + c), rtol=0, atol=1e-7)
        assert minimum.cost < minimum.start_cost
        assert minimum.gradient_norm < 1e-6
    assert calls[0] == [0, 1, 2]


def test_a_failing_cost_is_reported_and_leaves_no_thread(refused):
    calls = []

    def costs(v, rows):
        calls.append(rows)
        if len(calls) > 1:
            raise RuntimeError("the model is broken")
        return (v - 1).square().sum(1)

    refused(
        "the model is broken",
        minimize_each,
        costs,
        3,
        2,
        tolerance=1e-6,
        max_iterations=5,
        error=RuntimeError,
    )


def test_damped_interpolation_moves_a_fraction_of_the_way(homogeneous):
    background, observations = problem()
    whole = OptimalInterpolation(homogeneous)
    found = DampedInterpolation(whole, 0.25).analyze(background, observations)
    increment = whole.analyze(background, observations) - background
    assert increment.abs().max() > 0
    assert_close(found - background, increment / 4)
