import numpy as np
import pytest
import torch
from torch.testing import assert_close

from weather.baselines.covariance import DenseCovariance, SampleCovariance, gaspari_cohn
from weather.grid import great_circle_km

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


@pytest.mark.parametrize("half_width", [3000.0, np.inf])
def test_blocks_are_those_of_the_definition(samples, grid, half_width):
    covariance = SampleCovariance(samples, grid, localization_km=half_width, coupling=COUPLING)
    expected = full_matrix(samples, grid, half_width, COUPLING)
    rows, columns = torch.tensor([100, 3, 75, 3]), torch.tensor([8, 143, 0])
    assert covariance.size == len(expected) == 144
    assert_close(covariance.block(rows), expected[rows], rtol=0, atol=1e-12)
    assert_close(covariance.block(rows, columns), expected[rows][:, columns], rtol=0, atol=1e-12)
    dense = covariance.dense()
    assert_close(dense.matrix, expected, rtol=0, atol=1e-12)
    assert_close(dense.block(rows, columns), expected[rows][:, columns], rtol=0, atol=1e-12)


def test_channels_are_fully_coupled_by_default(samples, grid):
    both = SampleCovariance(samples, grid).block(torch.tensor([0]))
    apart = SampleCovariance(samples, grid, coupling=torch.eye(2)).block(torch.tensor([0]))
    assert_close(both[:, :72], apart[:, :72])
    assert (apart[:, 72:] == 0).all()
    assert both[:, 72:].abs().min() > 0


def test_localization_keeps_the_covariance_positive(samples, grid):
    localized = SampleCovariance(samples, grid, localization_km=3000.0).dense().matrix
    assert torch.linalg.eigvalsh(localized).min() > -1e-9
    assert torch.linalg.matrix_rank(localized) > len(samples)


@pytest.mark.parametrize(
    ("shape", "half_width", "message"),
    [
        ((1, 2, 6, 12), 1.0, "two samples"),
        ((5, 2, 12, 6), 1.0, "on \\(6, 12\\)"),
        ((5, 2, 6, 12), 0.0, "positive"),
    ],
)
def test_bad_arguments(grid, shape, half_width, message):
    with pytest.raises(ValueError, match=message):
        SampleCovariance(torch.zeros(shape), grid, localization_km=half_width)


def test_a_matrix_must_be_square():
    with pytest.raises(ValueError, match="square"):
        DenseCovariance(torch.zeros(3, 4))
