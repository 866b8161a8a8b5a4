"""Covariances in blocks: distances, tapers, samples, zonal symmetry."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from weather.baselines.covariance import (
    DenseCovariance,
    DistanceWeights,
    GridPoints,
    HomogeneousCovariance,
    SampleCovariance,
    ZonalFunction,
    gaspari_cohn,
    has_equal_steps,
)
from weather.baselines.optimal_interpolation import OptimalInterpolation
from weather.grid import EARTH_RADIUS_KM, Grid, gaussian_grid, great_circle_km, regular_grid
from weather.observations.gridded import GriddedObservations


def test_gaspari_cohn_golden(golden_filter):
    vectors = golden_filter[0]
    assert_close(gaspari_cohn(vectors["gc_r"]), vectors["gc_rho"], rtol=0, atol=1e-12)


def test_distances_run_over_rows_first():
    points = GridPoints(regular_grid(3, 4, poles=True))  # 90, 0, -90 by 0, 90, 180, 270
    distance = points.distances(torch.tensor([4, 0]))
    quarter = math.pi / 2 * EARTH_RADIUS_KM
    expected = torch.full((3, 4), quarter, dtype=torch.float64)
    expected[1] = torch.tensor([0.0, 1.0, 2.0, 1.0]) * quarter
    assert_close(distance[0].view(3, 4), expected)
    assert_close(distance[1], quarter * torch.tensor([0.0] * 4 + [1] * 4 + [2] * 4).double())
    assert_close(points.distances(torch.tensor([4, 0]), torch.tensor([6])), distance[:, 6:7])


def test_weights_are_kept_and_the_oldest_forgotten(grid):
    calls = []

    def weight(km):
        calls.append(len(km))
        return km

    weights = DistanceWeights(grid, weight, capacity_mib=2.5 * (72 * 8) / 2**20)
    first = weights.at(torch.tensor([3]), torch.float64)
    assert first[0, 3] == 0
    assert weights.at(torch.tensor([3]), torch.float64) is first
    weights.at(torch.tensor([4]), torch.float64)
    weights.at(torch.tensor([3]), torch.float64)
    weights.at(torch.tensor([5]), torch.float64)  # 4 was used least recently
    assert calls == [1, 1, 1]
    weights.at(torch.tensor([3]), torch.float64)
    assert calls == [1, 1, 1]
    weights.at(torch.tensor([4]), torch.float64)
    assert calls == [1, 1, 1, 1]
    # Another type, and weights larger than the capacity are returned all the same.
    assert weights.at(torch.arange(9), torch.float32).shape == (9, 72)


COUPLING = torch.tensor([[1.0, 0.3], [0.3, 1.0]], dtype=torch.float64)


@pytest.fixture
def samples(grid):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(7, 2, *grid.shape, generator=generator, dtype=torch.float64) + 5.0


def full_matrix(samples, grid, half_width, coupling):
    """B as an n x n matrix, by its definition."""
    latitude = grid.latitude.repeat_interleave(len(grid.longitude)).repeat(2)
    longitude = grid.longitude.repeat(len(grid.latitude)).repeat(2)
    distance = great_circle_km(latitude[:, None], longitude[:, None], latitude, longitude)
    sample = torch.from_numpy(np.cov(samples.flatten(1).numpy().T))
    points = len(latitude) // 2
    factor = coupling.repeat_interleave(points, 0).repeat_interleave(points, 1)
    return sample * gaspari_cohn(distance / half_width) * factor


@pytest.mark.parametrize(("half_width", "coupling"), [(3000.0, COUPLING), (np.inf, None)])
def test_blocks_are_those_of_the_definition(samples, grid, half_width, coupling):
    covariance = SampleCovariance(samples, grid, localization_km=half_width, coupling=coupling)
    factors = torch.ones(2, 2) if coupling is None else coupling  # all channels by default
    expected = full_matrix(samples, grid, half_width, factors)
    rows, columns = torch.tensor([100, 3, 75, 3]), torch.tensor([8, 143, 0])
    assert covariance.size == len(expected) == 144
    assert_close(covariance.block(rows), expected[rows], rtol=0, atol=1e-12)
    for one in (covariance, covariance.dense()):
        found = one.block(rows, columns)
        assert_close(found, expected[rows][:, columns], rtol=0, atol=1e-12)


def decay(km):
    return torch.exp(-km / 1500.0)


@pytest.mark.parametrize("columns", [8, 9])
def test_the_table_holds_the_function_of_all_distances(columns):
    grid = regular_grid(5, columns, poles=True)
    dense = decay(GridPoints(grid).distances(torch.arange(5 * columns)))
    found = ZonalFunction(grid, decay, torch.float64)
    points = torch.tensor([0, 3, columns, 4 * columns + 2, 2 * columns - 1])
    draw = torch.Generator().manual_seed(0)
    values, ones = torch.randn(2, 3, 5, generator=draw, dtype=torch.float64), torch.ones(5).double()
    sums, totals = found.weighted(points, values, ones)
    torch.testing.assert_close(sums, values @ dense[points])
    torch.testing.assert_close(totals, ones @ dense[points])


def test_pieces_of_points_add_up(monkeypatch):
    grid = regular_grid(6, 8, poles=False)
    points, values = torch.arange(0, 48, 3), torch.arange(16.0).double()
    whole = ZonalFunction(grid, decay, torch.float64).weighted(points, values)[0]
    monkeypatch.setattr("weather.baselines.covariance.ROWS", 5)
    pieces = ZonalFunction(grid, decay, torch.float64).weighted(points, values)[0]
    torch.testing.assert_close(pieces, whole)


def test_longitudes_must_have_equal_steps(refused):
    uneven = Grid(torch.tensor([10.0, -10.0]), torch.tensor([0.0, 90.0, 200.0]))
    assert not has_equal_steps(uneven)
    assert has_equal_steps(regular_grid(4, 7, poles=False))
    refused("longitudes of equal steps", ZonalFunction, uneven, decay, error=ValueError)


GRID = regular_grid(9, 16, poles=True)  # the pole rows hold the same point sixteen times
COUNT = 9 * 16
CORRELATION = torch.tensor([[1.0, 0.6], [0.6, 1.0]])


def deviation():
    rows = torch.linspace(1.0, 3.0, 9)
    return torch.stack((rows, 10 / rows))[:, :, None].expand(2, 9, 16)


def homogeneous(sd=None, correlation=CORRELATION, length_km=1.0):
    sd = deviation() if sd is None else sd
    return HomogeneousCovariance(sd, correlation, GRID, length_km=length_km)


def covariance(length_km=2500.0):
    return homogeneous(length_km=length_km)


def of_samples(*shape, localization_km=1.0):
    return SampleCovariance(
        torch.zeros(shape), gaussian_grid(6, 12), localization_km=localization_km
    )


def everything(b):
    return b.block(torch.arange(b.size))


def test_elements_are_those_of_the_formula():
    b, s = covariance(), deviation().flatten()
    lat, lon = GRID.latitude.repeat_interleave(16).repeat(2), GRID.longitude.repeat(18)
    distance = great_circle_km(lat[:, None], lon[:, None], lat, lon)
    coupling = CORRELATION.repeat_interleave(COUNT, 0).repeat_interleave(COUNT, 1)
    expected = (s[:, None] * s * coupling * gaspari_cohn(distance / 2500.0)).float()
    rows, columns = torch.tensor([250, 3, 3, 144]), torch.tensor([7, 280, 7])
    assert_close((everything(b), b.block(rows, columns)), (expected, expected[rows][:, columns]))


def test_estimates_of_samples_drawn_from_it():
    """Many samples give back deviations by row and the correlation of channels."""
    truth = covariance(1500.0)
    root = torch.linalg.cholesky(everything(truth).double() + 1e-4 * torch.eye(truth.size))
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(truth.size, 2000, generator=draw, dtype=torch.float64)
    samples = (root @ noise).T.reshape(2000, 2, 9, 16).float()
    found = HomogeneousCovariance.from_samples(samples, GRID, length_km=1500.0)
    variance = deviation()[:, :, 0].square()
    padded = torch.nn.functional.pad(variance[None], (2, 2), mode="replicate")[0]
    smooth = padded.unfold(1, 5, 1).mean(-1)
    assert_close(found.deviation.square()[..., 0], smooth, rtol=0.06, atol=0)
    assert_close(found.deviation.square()[..., 5], found.deviation.square()[..., 0])
    one = found.block(torch.tensor([70]), torch.tensor([70, 70 + COUNT]))
    product = found.deviation.flatten()[[70, 70 + COUNT]].square().prod()
    assert_close(one[0, 1] / product.sqrt(), torch.tensor(0.6), rtol=0, atol=0.03)


def test_the_mean_of_the_samples_is_taken_for_zero():
    found = HomogeneousCovariance.from_samples(torch.ones(4, 1, 9, 16), GRID, length_km=1500.0)
    assert_close(found.deviation, torch.ones(1, 9, 16))


def test_a_single_observation_moves_the_analysis_by_the_textbook_increment():
    b = covariance()
    point = (1, 4, 5)
    values, errors = torch.zeros(1, 2, 9, 16), torch.full((1, 2, 9, 16), torch.inf)
    values[0][point], errors[0][point] = 2.0, 0.5
    background = torch.zeros(1, 1, 2, 9, 16)
    seen = GriddedObservations(values, errors)
    analysis = OptimalInterpolation(b, scale=0.7).analyze(background, seen)
    column = everything(b)[COUNT + 4 * 16 + 5] * 0.49
    variance = column[COUNT + 4 * 16 + 5]
    assert_close(analysis.flatten(), column * 2.0 / (variance + 0.25), rtol=1e-4, atol=1e-6)
    assert analysis[0, 0, 0, 4, 5] > 0  # the correlated channel follows


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (lambda: of_samples(1, 2, 6, 12), "two samples"),
        (lambda: of_samples(5, 2, 12, 6), r"on \(6, 12\)"),
        (lambda: of_samples(5, 2, 6, 12, localization_km=0.0), "positive"),
        (lambda: DenseCovariance(torch.zeros(3, 4)), "square"),
        (lambda: homogeneous(deviation()[:, :-1]), r"expected standard deviations \(2, 9, 16\)"),
        (lambda: covariance(0.0), "length_km must be positive, got 0"),
        (lambda: homogeneous(correlation=torch.tensor([[1.0, 0.6], [0.2, 1.0]])), "symmetric with"),
        (lambda: homogeneous(correlation=2 * CORRELATION), "with ones on its diagonal"),
        (lambda: homogeneous(correlation=CORRELATION[:1]), "symmetric with ones"),
    ],
)
def test_wrong_arguments_are_refused(refused, words):
    with pytest.raises(ValueError, match=words):
        refused()
