"""FengWu as a forecast model: our network, and the layout of the published file."""

import itertools
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from core_gates.errors import GatesError
from tests.weather.models.fengwu.conftest import CHANNELS, INCREMENT, MEAN, STD
from weather.cycle import FramesForecast
from weather.models.fengwu.published import PublishedForecast, read_statistics
from weather.models.fengwu.trained_forecast import (
    FengWuForecast,
    ForecastForm,
    TrainedForecast,
    load_forecast,
    save_forecast,
)
from weather.state import FENGWU, ChannelSpec, Normalizer


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


@pytest.mark.parametrize("hours", [3.0, -6.0, 7.0])
def test_hours_between_steps(small_forecast, states, hours, refused):
    refused(
        f"multiple of the step of 6 h, got {hours}",
        small_forecast(),
        states[1],
        hours,
        error=ValueError,
    )


@torch.no_grad()
def test_states_keep_their_dtype(small_forecast, states):
    model, current = small_forecast(), states[1]
    assert model(current.double(), 6.0).dtype == torch.float64
    assert_close(model(current.double(), 6.0).float(), model(current, 6.0), rtol=1e-6, atol=1e-2)


def test_gradients_reach_the_states(small_forecast, states):
    """Strong-constraint 4D-Var goes through the forecast model, and both frames."""
    previous, current = (state.clone().requires_grad_() for state in states)
    following = small_forecast().requires_grad_(False)(current, 12.0, previous)
    for gradient in torch.autograd.grad(following.square().sum(), (previous, current)):
        assert (gradient != 0).all()


def test_statistics_of_other_channels(small_fengwu, refuses):
    refuses(
        ValueError,
        (
            r"normalizer must hold \(5,\) values, found \(3,\)",
            lambda: FengWuForecast(small_fengwu(), Normalizer(MEAN[:3], STD[:3]), INCREMENT),
        ),
        (
            r"increment_sd must hold \(5,\)",
            lambda: FengWuForecast(small_fengwu(), Normalizer(MEAN, STD), INCREMENT[:2]),
        ),
        (
            "step_hours must be positive",
            lambda: FengWuForecast(small_fengwu(), Normalizer(MEAN, STD), INCREMENT, step_hours=0),
        ),
    )


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


@pytest.mark.parametrize("part", [None, 0.0, 0.5])
def test_files_that_cannot_be_read(stored, part, refused):
    content = stored.read_bytes()
    stored.unlink()
    if part is not None:
        stored.write_bytes(content[: int(part * len(content))])
    refused(r"not readable as a forecast model.*train", load_forecast, stored)


@pytest.mark.parametrize("metadata", [None, {"forecast": "[1]"}])
def test_weights_of_something_else(stored, metadata, refused):
    save_file({"a": torch.zeros(2)}, stored, metadata=metadata)
    refused(r"weights of something else.*train", load_forecast, stored)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("increment_sd"), "1 tensors are missing, unknown or of another shape"),
        (lambda t: t.update(x=torch.zeros(1)), "first x, expected the"),
        (lambda t: t["increment_sd"].fill_(torch.nan), "1 tensors are not finite, first increment"),
        (lambda t: t.update(increment_sd=torch.ones(4)), "of another shape, first increment_sd"),
    ],
)
def test_damaged_weights(stored, change, words, refused):
    from safetensors import safe_open

    with safe_open(stored, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(stored)
    change(tensors)
    save_file(tensors, stored, metadata=metadata)
    refused(words, load_forecast, stored)


@pytest.mark.parametrize("facts", ['{"kind": "fengwu"}', '{"kind": "fengwu", "network": {"d": 1}}'])
def test_networks_that_cannot_be_built(stored, facts, refused):
    save_file(load_file(stored), stored, metadata={"forecast": facts})
    refused("cannot be built", load_forecast, stored)


def test_a_configuration_takes_a_trained_model(stored, states):
    model = TrainedForecast(str(stored)).train()
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(
        model(states[1], 6.0, states[0]), load_forecast(stored)(states[1], 6.0, states[0])
    )


FIXTURES = Path(__file__).parents[3] / "fixtures"


@pytest.fixture(scope="module")
def forecast(small_forecast):
    return small_forecast(depths=(0, 0), fuser_depth=2)


@pytest.fixture(scope="module")
def file(forecast, tmp_path_factory):
    pytest.importorskip("onnx")
    write = runpy.run_path(str(FIXTURES / "published_forecast.py"))["export_forecast"]
    return write(forecast, tmp_path_factory.mktemp("onnx") / "fengwu.onnx")


@pytest.fixture(scope="module")
def published(file):
    return PublishedForecast(file, CHANNELS)


@torch.no_grad()
@pytest.mark.costly("export to ONNX")
def test_it_forecasts_what_the_network_does(forecast, published, states, refused):
    previous, current = states
    assert isinstance(published, FramesForecast)
    assert published.grid_shape == (8, 16)
    expected = itertools.islice(forecast.rollout(current, previous), 3)
    for found, one in zip(published.rollout(current, previous), expected, strict=False):
        assert float(((found - one.mean) / STD[:, None, None]).abs().max()) < 1e-4
        assert found.dtype == current.dtype
    assert_close(published(current, 12.0, previous), forecast(current, 12.0, previous), rtol=1e-5,
                 atol=0.05)  # fmt: skip
    assert torch.equal(published(current, 12.0), published(current, 12.0, current))
    assert torch.equal(published(current, 0.0, previous), current)
    refused("multiple of the step of 6 h", published, current, 5.0, error=ValueError)


def test_the_file_has_the_published_layout(file, forecast, states):
    import onnxruntime

    session = onnxruntime.InferenceSession(file)
    (given,) = session.get_inputs()
    assert (given.name, given.shape) == ("input", [1, 10, 8, 16])
    frames = [(x[:1] - MEAN[:, None, None]) / STD[:, None, None] for x in states]
    found = session.run(None, {"input": torch.cat(frames, 1).numpy()})[0]
    with torch.no_grad():
        following = forecast.next_state(*(x[:1] for x in states))
    mean = torch.from_numpy(found[:, :5]) * STD[:, None, None] + MEAN[:, None, None]
    sd = torch.from_numpy(np.exp(found[:, 5:] / 2)) * STD[:, None, None]
    assert_close(mean, following.mean, rtol=1e-5, atol=0.05)
    assert_close(sd, following.sd, rtol=1e-3, atol=1e-3)
    assert_close(read_statistics(file.parent, CHANNELS).std, STD)


def changed(state, channel, change):
    state = state.clone()
    state[:, channel] = change(state[:, channel])
    return state


@pytest.mark.parametrize(
    ("channel", "change", "words"),
    [
        (0, lambda x: x / 100, "was given an impossible sp: .*it looks like hPa: multiply by 100"),
        (1, lambda x: x - 273.15, "impossible t500: .*it looks like degrees Celsius: add 273.15"),
        (3, lambda x: x + 500, "u500.*expected -150 to 150 m s-1; check its unit"),
        (4, lambda x: x + 70, "u850 that averages 11.*expected at most 8: check units, data_mean"),
        (2, lambda x: x * torch.nan, "was given values of t850 that are not finite"),
    ],
)
@pytest.mark.parametrize("frame", ["current", "previous"])
def test_states_that_cannot_be(published, states, channel, change, words, frame):
    previous, current = states
    if frame == "current":
        current = changed(current, channel, change)
    else:
        previous = changed(previous, channel, change)
    with pytest.raises(GatesError, match=words) as caught:
        published(current, 6.0, previous)
    assert "\n" not in str(caught.value)


def test_results_that_cannot_be(published, states, monkeypatch, refused):
    def broken(value):
        def run(names, inputs):
            return [np.full((1, 10, 8, 16), value, np.float32)]

        return type("Session", (), {"run": staticmethod(run), "get_inputs": inputs})()

    inputs = staticmethod(published.session.get_inputs)
    for value, words in ((np.nan, "returned values of sp that are not"), (90.0, "returned a")):
        monkeypatch.setattr(published, "session", broken(value))
        refused(words, published, states[1], 6.0)


def test_states_of_another_shape(published, states, refuses):
    refuses(
        GatesError,
        (
            r"takes states \(N, 5, 8, 16\), found \(2, 4, 8, 16\)",
            lambda: published(states[1][:, :4], 6.0),
        ),
        (r"found \(2, 5, 8, 12\): regrid", lambda: published(states[1][..., :12], 6.0)),
    )


def test_files_of_another_layout(file, refused):
    refused(r"expected one input \(1, 138, H, W\).*69 channels", PublishedForecast, file, FENGWU)
    few = ChannelSpec(surface=("surface_pressure",))
    refused(r"expected one input \(1, 2, H, W\)", PublishedForecast, file, few)


def test_damaged_files(file, tmp_path, refused):
    refused(
        "does not exist: name the ONNX file", PublishedForecast, tmp_path / "absent.onnx", CHANNELS
    )
    for content in (b"", b"garbage", file.read_bytes()[:5000]):
        path = tmp_path / "damaged.onnx"
        path.write_bytes(content)
        refused(r"cannot be loaded.*download or export it again", PublishedForecast, path, CHANNELS)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("data_mean.npy", None, "data_mean.npy cannot be read"),
        ("data_std.npy", b"", "data_std.npy cannot be read"),
        ("data_std.npy", np.ones(4, np.float32), "data_std.npy holds 4 numbers, expected 5"),
        ("data_std.npy", np.zeros(5, np.float32), "data_std.npy: channels .* not positive"),
        ("data_mean.npy", np.full(5, np.nan), "not finite"),
        ("data_mean.npy", np.array([{}] * 5), "data_mean.npy cannot be read"),
    ],
)
def test_statistics_that_do_not_fit(file, tmp_path, name, content, words, refused):
    for one in ("fengwu.onnx", "data_mean.npy", "data_std.npy"):
        (tmp_path / one).write_bytes((file.parent / one).read_bytes())
    if content is None:
        (tmp_path / name).unlink()
    elif isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        np.save(tmp_path / name, content, allow_pickle=True)
    refused(words, PublishedForecast, tmp_path / "fengwu.onnx", CHANNELS)
