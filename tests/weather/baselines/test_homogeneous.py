import pytest
import torch
from torch.testing import assert_close

from weather.baselines.covariance import HomogeneousCovariance, gaspari_cohn
from weather.baselines.optimal_interpolation import OptimalInterpolation, factorize
from weather.grid import great_circle_km, regular_grid
from weather.observations.gridded import GriddedObservations

GRID = regular_grid(9, 16, poles=True)  # the pole rows hold the same point sixteen times
COUNT = 9 * 16
CORRELATION = torch.tensor([[1.0, 0.6], [0.6, 1.0]])


def deviation():
    rows = torch.linspace(1.0, 3.0, 9)
    return torch.stack((rows, 10 / rows))[:, :, None].expand(2, 9, 16)


def covariance(length_km=2500.0):
    return HomogeneousCovariance(deviation(), CORRELATION, GRID, length_km=length_km)


def everything(b):
    return b.block(torch.arange(b.size))


def test_elements_are_those_of_the_formula():
    b, s = covariance(), deviation().flatten()
    matrix = everything(b)
    lat, lon = GRID.latitude.repeat_interleave(16), GRID.longitude.repeat(9)
    for row, column in ((0, 0), (37, 41), (37, 37 + COUNT), (20, 200), (130, 20)):
        i, j = row % COUNT, column % COUNT
        distance = great_circle_km(lat[i], lon[i], lat[j], lon[j])
        expected = s[row] * s[column] * CORRELATION[row // COUNT, column // COUNT]
        expected = expected * gaspari_cohn(distance / 2500.0)
        assert_close(matrix[row, column], expected.float())
    far = great_circle_km(lat[:, None], lon[:, None], lat, lon) >= 5000.0
    assert (matrix[:COUNT, :COUNT][far] == 0).all()
    assert (matrix[:COUNT, :COUNT][~far] > 0).all()


@pytest.mark.parametrize("length", [500.0, 2500.0, 6000.0])
def test_symmetric_with_the_stated_variance_and_positive_definite_with_errors(length):
    b = covariance(length)
    matrix = everything(b)
    assert_close(matrix, matrix.T, rtol=1e-5, atol=1e-6)
    assert_close(matrix.diagonal(), deviation().flatten().square())
    smallest = torch.linalg.eigvalsh(matrix.double()).min()
    assert smallest > -1e-4 * float(matrix.diagonal().max())
    errors = 0.1 * deviation().flatten()
    factor = factorize(b, errors, 1.0, max_cross_bytes=2**30)
    assert factor.cholesky.diagonal().min() > 0


def test_blocks_are_parts_of_the_whole():
    b = covariance()
    whole = everything(b)
    rows, columns = torch.tensor([250, 3, 3, 144]), torch.tensor([7, 280, 7])
    assert torch.equal(b.block(rows, columns), whole[rows][:, columns])
    assert torch.equal(b.block(rows), whole[rows])


def test_estimates_of_samples_drawn_from_it():
    """Many samples give back deviations by row and the correlation of channels."""
    truth = covariance(1500.0)
    matrix = everything(truth).double() + 1e-4 * torch.eye(truth.size)
    root = torch.linalg.cholesky(matrix)
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
    samples = torch.ones(4, 1, 9, 16)
    found = HomogeneousCovariance.from_samples(samples, GRID, length_km=1500.0)
    assert_close(found.deviation, torch.ones(1, 9, 16))


def test_a_single_observation_moves_the_analysis_by_the_textbook_increment():
    b = covariance()
    point = (1, 4, 5)
    values, errors = torch.zeros(1, 2, 9, 16), torch.full((1, 2, 9, 16), torch.inf)
    values[0][point], errors[0][point] = 2.0, 0.5
    background = torch.zeros(1, 1, 2, 9, 16)
    seen = GriddedObservations(values, errors)
    analysis = OptimalInterpolation(b, scale=0.7).analyse(background, seen)
    column = everything(b)[COUNT + 4 * 16 + 5] * 0.49
    variance = column[COUNT + 4 * 16 + 5]
    assert_close(analysis.flatten(), column * 2.0 / (variance + 0.25), rtol=1e-4, atol=1e-6)
    assert analysis[0, 0, 0, 4, 5] > 0  # the correlated channel follows


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"expected standard deviations \(2, 9, 16\)"):
        HomogeneousCovariance(deviation()[:, :-1], CORRELATION, GRID, length_km=1.0)
    with pytest.raises(ValueError, match="length_km must be positive, got 0"):
        covariance(0.0)
    lopsided = torch.tensor([[1.0, 0.6], [0.2, 1.0]])
    for wrong in (lopsided, 2 * CORRELATION, CORRELATION[:1]):
        with pytest.raises(ValueError, match="symmetric with ones on its diagonal"):
            HomogeneousCovariance(deviation(), wrong, GRID, length_km=1.0)
