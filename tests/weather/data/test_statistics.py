import numpy as np
import pytest
import torch

from weather.data.climatology import channel_statistics, root_mean_square_difference
from weather.grid import regular_grid
from weather.state import Normalizer

GRID = regular_grid(10, 12, poles=False)


def states(count, seed):
    draw = torch.Generator().manual_seed(seed)
    scale = torch.tensor([1.0, 300.0, 3e-4])[:, None, None]
    shift = torch.tensor([0.0, 5e4, 0.01])[:, None, None]
    return shift + scale * torch.randn(count, 3, *GRID.shape, generator=draw)


def test_moments_are_those_in_memory():
    frames, chosen = states(20, 0), [3, 4, 9, 17]
    found = channel_statistics(frames.numpy(), GRID.area_weights(), chosen)
    expected = Normalizer.fit(frames[chosen].double(), area_weights=GRID.area_weights())
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-6)
    np.testing.assert_allclose(found.sd, expected.std, rtol=1e-6)
    whole = channel_statistics(frames.numpy(), GRID.area_weights())
    assert np.abs(whole.mean - found.mean).min() > 0


def test_root_mean_squares_are_those_in_memory():
    truth, background = states(20, 0), states(9, 1)
    pairs = np.array([3, 4, 9]), np.array([8, 0, 1])
    found = root_mean_square_difference(
        truth.numpy(), background.numpy(), GRID.area_weights(), pairs
    )
    gap = truth[pairs[0]].double() - background[pairs[1]]
    expected = GRID.area_mean(gap.square()).mean(0).sqrt()
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_nothing_has_no_statistics():
    with pytest.raises(ValueError, match="there is no frame"):
        channel_statistics(states(2, 0).numpy(), GRID.area_weights(), [])
