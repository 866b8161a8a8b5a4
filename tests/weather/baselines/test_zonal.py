import pytest
import torch

from weather.baselines.covariance import GridPoints, ZonalFunction, has_equal_steps
from weather.grid import Grid, regular_grid


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


def test_longitudes_must_have_equal_steps():
    uneven = Grid(torch.tensor([10.0, -10.0]), torch.tensor([0.0, 90.0, 200.0]))
    assert not has_equal_steps(uneven)
    assert has_equal_steps(regular_grid(4, 7, poles=False))
    with pytest.raises(ValueError, match="longitudes of equal steps"):
        ZonalFunction(uneven, decay)
