import pytest
import torch

from weather.baselines.covariance import HomogeneousCovariance
from weather.baselines.optimal_interpolation import IterativeInterpolation, OptimalInterpolation
from weather.grid import Grid, regular_grid
from weather.observations.gridded import GriddedObservations
from weather.observations.simulated import observe

GRID = regular_grid(9, 16, poles=True)
SHAPE = (3, *GRID.shape)


def draw(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def covariance():
    scale = torch.tensor([30.0, 1.0, 4.0])[:, None, None]
    samples = scale * torch.randn(12, *SHAPE, generator=draw(0))
    samples[:, 1] += samples[:, 0] / 50  # channels that vary together
    return HomogeneousCovariance.from_samples(samples, GRID, length_km=3000.0)


def problem(members=1):
    truth = torch.randn(2, *SHAPE, generator=draw(1)) * 20
    network = torch.rand(SHAPE, generator=draw(2)) < 0.3  # each channel at its own points
    errors = torch.tensor([3.0, 0.5, 1.0])
    seen = observe(truth, network, errors, generator=draw(3))
    nothing = GriddedObservations.absent(SHAPE)
    observations = GriddedObservations.stack(
        [GriddedObservations(seen.values[0], seen.errors[0]), nothing]
    )
    return torch.randn(2, members, *SHAPE, generator=draw(4)) * 20, observations


@pytest.mark.parametrize("members", [1, 2])
def test_iterations_end_at_the_direct_solution(covariance, members):
    background, observations = problem(members)
    exact = OptimalInterpolation(covariance, scale=0.7, members=members)
    method = IterativeInterpolation(covariance, scale=0.7, members=members, tolerance=1e-10)
    expected, found = (one.analyse(background, observations) for one in (exact, method))
    moved = (expected - background)[0].abs().amax((0, 2, 3))
    assert ((found - expected)[0].abs().amax((0, 2, 3)) <= 1e-5 * moved).all()
    assert (moved > 0.5).all()
    assert torch.equal(found[1], background[1])  # no observation, no change


def test_the_product_is_that_of_the_matrix(covariance):
    method = IterativeInterpolation(covariance)
    dense = covariance.block(torch.arange(covariance.size)).double()
    fields = torch.randn(SHAPE, generator=draw(5)).double()
    expected = (dense @ fields.flatten()).view(SHAPE)
    torch.testing.assert_close(method.multiply(fields), expected, rtol=1e-5, atol=1e-4)


def test_a_looser_tolerance_ends_earlier_and_near(covariance, monkeypatch):
    calls = []
    multiply = IterativeInterpolation.multiply
    monkeypatch.setattr(
        IterativeInterpolation, "multiply", lambda self, x: (calls.append(1), multiply(self, x))[1]
    )
    background, observations = problem()
    found = []
    for tolerance in (1e-8, 1e-2):
        calls.clear()
        method = IterativeInterpolation(covariance, tolerance=tolerance)
        found.append((len(calls), method.analyse(background, observations), len(calls)))
    (_, exact, many), (_, near, few) = found
    assert few < many
    moved = (exact - background)[0].square().mean().sqrt()
    assert (near - exact)[0].square().mean().sqrt() < 0.05 * moved


def test_another_length_is_another_covariance(covariance):
    shorter = covariance.with_length(500.0)
    assert shorter.length_km == 500.0
    torch.testing.assert_close(shorter.deviation, covariance.deviation)
    assert shorter.block(torch.tensor([20]))[0, 21] < covariance.block(torch.tensor([20]))[0, 21]


def test_impossible_arguments_are_refused(covariance):
    for arguments, words in (
        ({"scale": 0.0}, "scale must be positive"),
        ({"tolerance": 1.0}, "0 < tolerance < 1"),
        ({"max_iterations": 0}, "max_iterations >= 1"),
    ):
        with pytest.raises(ValueError, match=words):
            IterativeInterpolation(covariance, **arguments)
    uneven = Grid(torch.tensor([10.0, -10.0]), torch.tensor([0.0, 90.0, 200.0]))
    odd = HomogeneousCovariance(torch.ones(1, 2, 3), torch.ones(1, 1), uneven, length_km=500.0)
    with pytest.raises(ValueError, match="equal steps"):
        IterativeInterpolation(odd)
    with pytest.raises(ValueError, match="expected a background"):
        IterativeInterpolation(covariance).analyse(torch.zeros(1, 1, 2, 9, 16), problem()[1])
