import pytest
import torch
from torch.testing import assert_close

from weather.baselines.covariance import DenseCovariance
from weather.baselines.minimizer import DenseControl, minimize_each
from weather.baselines.optimal_interpolation import OptimalInterpolation
from weather.baselines.spectral_covariance import SpectralCovariance
from weather.baselines.variational import ThreeDVar
from weather.observations.gridded import GriddedObservations
from weather.observations.simulated import bernoulli_network, observe
from weather.spherical import SphericalTransform
from weather.state import SHALLOW_WATER

TRANSFORM = SphericalTransform(6, 10, 20)
SD = torch.tensor([20.0, 3.0, 3.0], dtype=torch.float64)


def spectral():
    return SpectralCovariance.univariate(TRANSFORM, SHALLOW_WATER, SD, length_km=3000.0)


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
    analysis = ThreeDVar(DenseControl(vectors["B"])).analyse(background, observations)
    expected = vectors["oi_xa"].view_as(background)
    assert relative(analysis, expected, background) <= 1e-6
    assert_close(analysis, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_the_spectral_minimiser_is_optimal_interpolation(scale):
    background, observations = spectral_problem()
    b = spectral()
    analysis = ThreeDVar(b, scale=scale).analyse(background, observations)
    expected = OptimalInterpolation(b, scale=scale).analyse(background, observations)
    assert relative(analysis, expected, background) <= 1e-6
    assert relative(background, expected, background) == 1.0


def test_timelines_and_members_are_independent():
    background, observations = spectral_problem(members=2)
    method = ThreeDVar(spectral(), members=2, tolerance=1e-3)
    together = method.analyse(background, observations)
    alone = ThreeDVar(spectral(), tolerance=1e-3).analyse(
        background[1:, 1:], GriddedObservations(*(part[1:] for part in observations))
    )
    assert relative(together[1:, 1:], alone, background[1:, 1:]) <= 1e-9


@pytest.mark.fault("weather outage")
def test_what_observes_nothing_or_is_lost_stays_exactly():
    background, observations = spectral_problem(timelines=3)
    keep = torch.tensor([True, False, True])[:, None, None, None]
    background[2, 0, 0, 0, 0] = torch.nan
    method = ThreeDVar(spectral(), tolerance=1e-3)
    analysis = method.analyse(background, observations.withhold(keep))
    assert torch.equal(analysis[1:].nan_to_num(7.0), background[1:].nan_to_num(7.0))
    assert analysis[0].isfinite().all()
    assert not torch.equal(analysis[0], background[0])
    nothing = observations.withhold(torch.zeros(()).bool())
    found = method.analyse(background[:2], GriddedObservations(*(p[:2] for p in nothing)))
    assert torch.equal(found, background[:2])
    assert found.data_ptr() != background.data_ptr()


def test_single_precision_is_kept_and_close():
    background, observations = spectral_problem()
    b = spectral()
    exact = ThreeDVar(b).analyse(background, observations)
    found = ThreeDVar(b).analyse(background.float(), observations.to(torch.float32))
    assert found.dtype == torch.float32
    assert_close(found.double(), exact, rtol=0, atol=1e-3)


def test_a_dense_and_a_spectral_root_of_one_covariance_agree():
    background, observations = spectral_problem(timelines=1)
    b = spectral()
    dense = DenseControl(b.block(torch.arange(b.size)))
    one = ThreeDVar(b).analyse(background, observations)
    other = ThreeDVar(dense).analyse(background, observations)
    assert relative(one, other, background) <= 1e-6


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


def test_a_failing_cost_is_reported_and_leaves_no_thread():
    calls = []

    def costs(v, rows):
        calls.append(rows)
        if len(calls) > 1:
            raise RuntimeError("the model is broken")
        return (v - 1).square().sum(1)

    with pytest.raises(RuntimeError, match="the model is broken"):
        minimize_each(costs, 3, 2, tolerance=1e-6, max_iterations=5)


def test_wrong_arguments_are_refused(golden_filter):
    vectors, _, _ = golden_filter
    control = DenseControl(vectors["B"])
    with pytest.raises(ValueError, match="scale must be positive, got 0"):
        ThreeDVar(control, scale=0)
    with pytest.raises(ValueError, match="tolerance must lie between 0 and 1, got 1"):
        ThreeDVar(control, tolerance=1)
    with pytest.raises(ValueError, match="max_iterations must be at least 1, got 0"):
        ThreeDVar(control, max_iterations=0)
    background, observations = spectral_problem()
    with pytest.raises(ValueError, match=r"C\*H\*W = 60"):
        ThreeDVar(control).analyse(background, observations)


def test_the_covariance_serves_both():
    """The protocol of B: blocks of the spectral covariance are those of its matrix."""
    b = spectral()
    whole = DenseCovariance(b.block(torch.arange(b.size)))
    rows, columns = torch.tensor([3, 300, 3]), torch.tensor([500, 3])
    assert_close(b.block(rows, columns), whole.block(rows, columns), rtol=0, atol=1e-10)
    rows = torch.tensor([0, 7, 100])
    assert_close(b.block(rows), whole.block(rows))
