"""Forecast models by name."""

import pytest
import torch

from core_gates.errors import GatesError
from weather.cycle import FramesForecast, advance
from weather.models.fengwu.network import fengwu_preset
from weather.models.fengwu.trained_forecast import FengWuForecast, save_forecast
from weather.operations.forecasts import find_forecast
from weather.state import SHALLOW_WATER, Normalizer

SHAPE = (2, 3, 16, 32)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    torch.manual_seed(0)
    network = fengwu_preset("unit", dim=4, depths=(1, 1), fuser_depth=1)
    torch.nn.init.normal_(network.decoders[0].recovery.weight, std=0.1)
    path = tmp_path_factory.mktemp("forecast") / "forecast.safetensors"
    save_forecast(
        path, FengWuForecast(network, Normalizer(torch.zeros(3), torch.ones(3)), torch.ones(3))
    )
    return path


def found(name):
    return find_forecast(str(name), None, SHALLOW_WATER).forecast


def test_a_trained_forecast_takes_both_frames(file):
    model = found(file)
    assert isinstance(model, FramesForecast)
    states, previous = torch.randn(2, *SHAPE).unbind(0)
    both = advance(model, states, 6.0, previous)
    assert both.shape == states.shape
    assert not both.requires_grad
    assert not torch.equal(both, advance(model, states, 6.0))
    assert not torch.equal(both, states)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda x: x[:, :2],
            r"refuses the states \(current must be \(2, 3, 16, 32\)|\(\.\.\., 3, H",
        ),
        (lambda x: x[..., :30], "refuses the states .*name a model of their channels, grid"),
        (lambda x: x * torch.nan, "returned values that are not finite after 6 h"),
    ],
)
def test_states_that_it_cannot_take(file, change, words):
    with pytest.raises(GatesError, match=words):
        found(file)(change(torch.randn(SHAPE)), 6.0)
    with pytest.raises(GatesError, match="multiple of the step of 6 h, got 5"):
        found(file)(torch.randn(SHAPE), 5.0)


def test_files_that_are_none(tmp_path):
    with pytest.raises(GatesError, match="not readable as a forecast model"):
        found(tmp_path / "absent.safetensors")
    with pytest.raises(GatesError, match=r"absent\.onnx does not exist"):
        found(tmp_path / "absent.onnx")


MODELS = """
class Double:
    def __call__(self, states, hours):
        return 2 * states

class Lazy:
    frames, step_hours = 2, 6.0
    def __call__(self, states, hours, previous=None):
        return states if previous is None else previous

def short(states, hours):
    return states[:1]
"""


def test_models_of_a_user(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(MODELS)
    x = torch.ones(SHAPE)
    one = found(f"{path}:Double")
    assert not isinstance(one, FramesForecast)
    assert torch.equal(advance(one, x, 6.0, 0 * x), 2 * x)
    two = found(f"{path}:Lazy")
    assert torch.equal(advance(two, x, 6.0, 0 * x), 0 * x)
    with pytest.raises(GatesError, match=r"returned the shape \(1, 3, 16, 32\), expected \(2, 3"):
        found(f"{path}:short")(x, 6.0)
