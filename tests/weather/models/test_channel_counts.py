import pytest

from weather.models.adas.network import Adas
from weather.models.fengwu.network import FengWu


@pytest.mark.parametrize("network", [Adas, FengWu])
@pytest.mark.parametrize("counts", [(0, 0, 0), (1, 2, 0), (1, 0, 3)])
def test_a_state_without_channels_or_levels_is_refused(network, counts):
    names = ("num_surface", "num_upper", "num_levels")
    with pytest.raises(ValueError, match="surface channels, or upper variables with levels"):
        network(grid_shape=(8, 16), dim=4, **dict(zip(names, counts, strict=True)))
