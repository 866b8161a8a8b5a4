import pytest
import torch

from weather.models.adas.network import Adas
from weather.models.adas.presets import MOST_COLUMNS, network_shape


@pytest.mark.parametrize(
    ("grid", "patch", "window"),
    [
        ((121, 240), 4, 5),  # 1.5 degrees with poles
        ((721, 1440), 24, 5),
        ((32, 64), 2, 4),
        ((61, 120), 2, 5),
        ((181, 360), 6, 5),
        ((16, 32), 2, 2),
    ],
)
def test_windows_divide_the_tokens_of_all_scales(grid, patch, window):
    found = network_shape(grid, 4, 4, 4)
    assert found["patch_size"] == [patch, patch]
    assert found["window_size"][2] == window
    tokens = grid[1] // patch
    assert tokens <= MOST_COLUMNS
    assert tokens % (4 * window) == 0
    assert tokens // 4 // window >= 2


def test_channels_decide_on_depth():
    assert network_shape((32, 64), 3, 0, 0)["window_size"][0] == 1
    assert network_shape((32, 64), 3, 0, 0)["kernel_sizes"][0][0] == 1
    deep = network_shape((32, 64), 1, 2, 3)
    assert (deep["num_surface"], deep["num_upper"], deep["num_levels"]) == (1, 2, 3)
    assert (deep["window_size"][0], deep["kernel_sizes"][0][0]) == (2, 3)


@pytest.mark.parametrize("grid", [(16, 32), (9, 20), (13, 18), (7, 10)])
def test_every_grid_has_a_network(grid):
    shape = network_shape(grid, 1, 1, 2)
    network = Adas(**shape, dim=4, num_heads=2, decoder_depth=1, position="latitude")
    fields = torch.zeros(1, 3, *grid)
    assert network(fields, fields, fields).shape == fields.shape
