import itertools

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from core_gates.errors import GatesError
from weather.cycle import FramesForecast
from weather.models.fengwu.trained_forecast import (
    FengWuForecast,
    ForecastForm,
    TrainedForecast,
    load_forecast,
    save_forecast,
)
from weather.state import Normalizer

from .conftest import INCREMENT, MEAN, STD


def normalized(x):
    return (x - MEAN[:, None, None]) / STD[:, None, None]


def test_a_step_adds_the_change_in_its_units(small_forecast, states):
    model, (previous, current) = small_forecast(), states
    with torch.no_grad():
        change = model.network(normalized(previous), normalized(current))
        expected = current + INCREMENT[:, None, None] * change.mean
        following = model.next_state(previous, current)
    assert_close(following.mean, expected)
    assert_close(following.sd, INCREMENT[:, None, None] * (change.log_variance / 2).exp())
    assert_close(model.scaled_change(current, expected), change.mean, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_forecast_is_its_steps_with_both_frames(small_forecast, states):
    model, (previous, current) = small_forecast(), states
    steps = []
    before, now = previous, current
    for _ in range(4):
        before, now = now, model.next_state(before, now).mean
        steps.append(now)
    assert torch.equal(model(current, 24.0, previous), steps[-1])
    rolled = itertools.islice(model.rollout(current, previous), 4)
    for step, expected in zip(rolled, steps, strict=True):
        assert torch.equal(step.mean, expected)
    assert torch.equal(model(current, 0.0, previous), current)
    assert not torch.equal(model(current, 6.0, previous), model(current, 6.0))
    assert torch.equal(model(current, 12.0), model(current, 12.0, current))


def test_it_is_a_model_of_two_frames(small_forecast):
    assert isinstance(small_forecast(), FramesForecast)


@pytest.mark.parametrize("hours", [3.0, -6.0, 7.0])
def test_hours_between_steps(small_forecast, states, hours):
    with pytest.raises(ValueError, match=f"multiple of the step of 6 h, got {hours}"):
        small_forecast()(states[1], hours)


@torch.no_grad()
def test_states_keep_their_dtype(small_forecast, states):
    model, current = small_forecast(), states[1]
    assert model(current.double(), 6.0).dtype == torch.float64
    assert_close(model(current.double(), 6.0).float(), model(current, 6.0), rtol=1e-6, atol=1e-2)


def test_gradients_reach_the_states(small_forecast, states):
    """Strong-constraint 4D-Var goes through the forecast model."""
    model = small_forecast().double().requires_grad_(False)
    current = states[1][:1].double().requires_grad_()
    draw = torch.Generator().manual_seed(1)
    direction = torch.randn(current.shape, generator=draw, dtype=torch.float64)
    direction = direction * STD[:, None, None]

    def cost(x):
        return (model(x, 12.0) / STD[:, None, None]).square().mean()

    (gradient,) = torch.autograd.grad(cost(current), current)
    step = 1e-6
    with torch.no_grad():
        difference = cost(current + step * direction) - cost(current - step * direction)
    assert_close((gradient * direction).sum(), difference / (2 * step), rtol=1e-6, atol=1e-9)


def test_statistics_of_other_channels(small_fengwu):
    with pytest.raises(ValueError, match=r"normalizer must hold \(5,\) values, found \(3,\)"):
        FengWuForecast(small_fengwu(), Normalizer(MEAN[:3], STD[:3]), INCREMENT)
    with pytest.raises(ValueError, match=r"increment_sd must hold \(5,\)"):
        FengWuForecast(small_fengwu(), Normalizer(MEAN, STD), INCREMENT[:2])
    with pytest.raises(ValueError, match="step_hours must be positive"):
        FengWuForecast(small_fengwu(), Normalizer(MEAN, STD), INCREMENT, step_hours=0)


@torch.no_grad()
def test_a_stored_model_forecasts_the_same(small_forecast, states, tmp_path):
    model = small_forecast()
    for parameter in model.network.parameters():  # as the file holds them
        parameter.data = parameter.data.bfloat16().float()
    ForecastForm().save(tmp_path, model)
    loaded = ForecastForm().load(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    found, expected = loaded(states[1], 12.0, states[0]), model(states[1], 12.0, states[0])
    assert_close(found, expected, rtol=1e-6, atol=1e-5)
    assert torch.equal(
        found, load_forecast(tmp_path / ForecastForm.FILE)(states[1], 12.0, states[0])
    )
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.network.arguments["grid_shape"] == [8, 16]
    first = (tmp_path / ForecastForm.FILE).read_bytes()
    ForecastForm().save(tmp_path, model)
    assert (tmp_path / ForecastForm.FILE).read_bytes() == first


@pytest.fixture
def stored(small_forecast, tmp_path):
    save_forecast(tmp_path / "f.safetensors", small_forecast())
    return tmp_path / "f.safetensors"


def test_files_that_are_no_forecast_model(stored, tmp_path):
    def refused(path, words):
        with pytest.raises(GatesError, match=words) as caught:
            load_forecast(path)
        assert "train" in str(caught.value)

    refused(tmp_path / "absent.safetensors", "not readable as a forecast model")
    content = stored.read_bytes()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(content[: len(content) // 2])
    refused(cut, "not readable as a forecast model")
    cut.write_bytes(b"")
    refused(cut, "not readable as a forecast model")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": torch.zeros(2)}, foreign)
    refused(foreign, "weights of something else")
    save_file({"a": torch.zeros(2)}, foreign, metadata={"forecast": "[1]"})
    refused(foreign, "weights of something else")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("increment_sd"), "1 tensors are missing, unknown or of another shape"),
        (lambda t: t.update(x=torch.zeros(1)), "first x, expected the"),
        (lambda t: t["increment_sd"].fill_(torch.nan), "1 tensors are not finite, first increment"),
        (lambda t: t.update(increment_sd=torch.ones(4)), "of another shape, first increment_sd"),
    ],
)
def test_damaged_weights(stored, change, words):
    from safetensors import safe_open

    with safe_open(stored, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(stored)
    change(tensors)
    save_file(tensors, stored, metadata=metadata)
    with pytest.raises(GatesError, match=words):
        load_forecast(stored)


@pytest.mark.parametrize("facts", ['{"kind": "fengwu"}', '{"kind": "fengwu", "network": {"d": 1}}'])
def test_networks_that_cannot_be_built(stored, facts):
    tensors = load_file(stored)
    save_file(tensors, stored, metadata={"forecast": facts})
    with pytest.raises(GatesError, match="cannot be built"):
        load_forecast(stored)


def test_a_configuration_takes_a_trained_model(stored, states):
    model = TrainedForecast(str(stored)).train()
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(
        model(states[1], 6.0, states[0]), load_forecast(stored)(states[1], 6.0, states[0])
    )
