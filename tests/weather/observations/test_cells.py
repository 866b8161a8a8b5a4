import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from weather.grid import Grid, gaussian_grid, regular_grid
from weather.observations.gridded import cell_of

GRIDS = {
    "gaussian": gaussian_grid(8, 16),
    "poles": regular_grid(9, 12, poles=True),
    "ascending": Grid(torch.linspace(-80, 80, 9), torch.arange(10) * 36.0),
    "from -180": Grid(torch.linspace(80, -80, 9), torch.arange(10) * 36.0 - 180),
}


@pytest.mark.parametrize("name", GRIDS)
def test_centers_lie_in_their_own_cells(name):
    grid = GRIDS[name]
    latitude, longitude = torch.meshgrid(grid.latitude, grid.longitude, indexing="ij")
    for turn in (-360, 0, 360):
        row, column = cell_of(grid, latitude, longitude + turn)
        assert torch.equal(row, torch.arange(grid.shape[0])[:, None].expand(grid.shape))
        assert torch.equal(column, torch.arange(grid.shape[1]).expand(grid.shape))


@given(
    st.sampled_from(sorted(GRIDS)),
    st.floats(-90, 90),
    st.floats(-180, 360, exclude_max=True),
)
def test_cell_is_the_nearest_row_and_column(name, latitude, longitude):
    grid = GRIDS[name]
    row, column = cell_of(grid, torch.tensor([latitude]), torch.tensor([longitude]))
    rows = (grid.latitude - latitude).abs()
    columns = ((grid.longitude - longitude + 180) % 360 - 180).abs()
    assert rows[row].item() <= rows.min().item() + 1e-4
    assert columns[column].item() <= columns.min().item() + 1e-4
