import math

import torch
from torch.testing import assert_close

from weather.baselines.covariance import DistanceWeights, GaspariCohnTaper, GridPoints, gaspari_cohn
from weather.grid import EARTH_RADIUS_KM, regular_grid


def test_gaspari_cohn_golden(golden_filter):
    vectors = golden_filter[0]
    assert_close(gaspari_cohn(vectors["gc_r"]), vectors["gc_rho"], rtol=0, atol=1e-12)


def test_gaspari_cohn_is_even_smooth_and_compact():
    ratio = torch.tensor([0.0, 1 - 1e-9, 1 + 1e-9, 2.0, 5.0, torch.inf], dtype=torch.float64)
    rho = gaspari_cohn(ratio)
    assert rho[0] == 1
    assert_close(rho[1], rho[2], rtol=0, atol=1e-8)
    assert_close(rho[1].item(), 5 / 24, rtol=0, atol=1e-8)  # 1 - 5/3 + 5/8 + 1/2 - 1/4
    assert (rho[3:] == 0).all()
    assert torch.equal(gaspari_cohn(-ratio), rho)


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

    num_bytes = 72 * 8
    weights = DistanceWeights(grid, weight, capacity_mib=2.5 * num_bytes / 2**20)
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


def test_an_infinite_half_width_does_not_taper():
    assert (GaspariCohnTaper(math.inf)(torch.tensor([0.0, 2e4])) == 1).all()
