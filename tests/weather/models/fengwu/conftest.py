"""Small networks with weights that matter."""

import pytest
import torch
from torch import nn

from weather.models.fengwu.network import FengWu
from weather.models.fengwu.trained_forecast import FengWuForecast
from weather.state import ChannelSpec, Normalizer

CHANNELS = ChannelSpec(
    surface=("surface_pressure",),
    upper=("temperature", "u_component_of_wind"),
    levels=(500, 850),
)
MEAN = torch.tensor([1e5, 250.0, 270.0, 5.0, 2.0])
STD = torch.tensor([900.0, 9.0, 10.0, 8.0, 6.0])
INCREMENT = torch.tensor([200.0, 1.5, 2.0, 3.0, 2.5])


@pytest.fixture(scope="session")
def small_fengwu():
    """``small_fengwu(**changes)``: 5 channels on 8 x 16, every output different from zero."""

    def build(seed=0, **changes):
        arguments = {
            "grid_shape": (8, 16),
            "num_surface": 1,
            "num_upper": 2,
            "num_levels": 2,
            "dim": 4,
            "window_size": (2, 2),
            "num_heads": (2, 2),
            "depths": (1, 2),
            "fuser_depth": 2,
        } | changes
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = FengWu(**arguments)
            for decoder in network.decoders:
                nn.init.normal_(decoder.recovery.weight, std=0.1)
                nn.init.normal_(decoder.recovery.bias, std=0.1)
        return network.eval()

    return build


@pytest.fixture(scope="session")
def small_forecast(small_fengwu):
    def build(**changes):
        return FengWuForecast(small_fengwu(**changes), Normalizer(MEAN, STD), INCREMENT).eval()

    return build


@pytest.fixture(scope="session")
def states():
    """Two successive states (2, 5, 8, 16) in physical units."""
    draw = torch.Generator().manual_seed(3)
    previous = torch.randn(2, 5, 8, 16, generator=draw)
    current = previous + 0.2 * torch.randn(2, 5, 8, 16, generator=draw)
    units = MEAN[:, None, None], STD[:, None, None]
    return tuple(units[0] + units[1] * x for x in (previous, current))
