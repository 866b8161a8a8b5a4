"""The ONNX layout of the published FengWu, tested on a small network that is written in it."""

import itertools
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from core_gates.errors import GatesError, MissingExtraError
from weather.cycle import FramesForecast
from weather.models.fengwu.published import PublishedForecast, read_statistics
from weather.state import FENGWU, ChannelSpec

from .conftest import CHANNELS, MEAN, STD

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


@pytest.mark.costly("export to ONNX")
@torch.no_grad()
def test_it_forecasts_what_the_network_does(forecast, published, states):
    previous, current = states
    assert isinstance(published, FramesForecast)
    assert published.grid_shape == (8, 16)
    expected = itertools.islice(forecast.rollout(current, previous), 3)
    for found, one in zip(published.rollout(current, previous), expected, strict=False):
        error = (found - one.mean) / STD[:, None, None]
        assert float(error.abs().max()) < 1e-4
        assert found.dtype == current.dtype
    assert_close(published(current, 12.0, previous), forecast(current, 12.0, previous), rtol=1e-5,
                 atol=0.05)  # fmt: skip
    assert torch.equal(published(current, 12.0), published(current, 12.0, current))
    assert torch.equal(published(current, 0.0, previous), current)
    with pytest.raises(ValueError, match="multiple of the step of 6 h"):
        published(current, 5.0)


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


def test_channels_in_another_order(published, states):
    wrong = states[1][:, [1, 0, 2, 3, 4]]
    with pytest.raises(GatesError, match="impossible sp: surface_pressure ranges from"):
        published(wrong, 6.0)


def test_results_that_cannot_be(published, states, monkeypatch):
    def broken(value):
        def run(names, inputs):
            return [np.full((1, 10, 8, 16), value, np.float32)]

        return type("Session", (), {"run": staticmethod(run), "get_inputs": inputs})()

    inputs = staticmethod(published.session.get_inputs)
    for value, words in ((np.nan, "returned values of sp that are not"), (90.0, "returned a")):
        monkeypatch.setattr(published, "session", broken(value))
        with pytest.raises(GatesError, match=words):
            published(states[1], 6.0)


def test_states_of_another_shape(published, states):
    with pytest.raises(GatesError, match=r"takes states \(N, 5, 8, 16\), found \(2, 4, 8, 16\)"):
        published(states[1][:, :4], 6.0)
    with pytest.raises(GatesError, match=r"found \(2, 5, 8, 12\): regrid"):
        published(states[1][..., :12], 6.0)


def test_files_of_another_layout(file):
    with pytest.raises(GatesError, match=r"expected one input \(1, 138, H, W\).*69 channels"):
        PublishedForecast(file, FENGWU)
    few = ChannelSpec(surface=("surface_pressure",))
    with pytest.raises(GatesError, match=r"expected one input \(1, 2, H, W\)"):
        PublishedForecast(file, few)


def test_damaged_files(file, tmp_path):
    with pytest.raises(GatesError, match="does not exist: name the ONNX file"):
        PublishedForecast(tmp_path / "absent.onnx", CHANNELS)
    for content in (b"", b"garbage", file.read_bytes()[:5000]):
        path = tmp_path / "damaged.onnx"
        path.write_bytes(content)
        with pytest.raises(GatesError, match=r"cannot be loaded.*download or export it again"):
            PublishedForecast(path, CHANNELS)


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
def test_statistics_that_do_not_fit(file, tmp_path, name, content, words):
    for one in ("fengwu.onnx", "data_mean.npy", "data_std.npy"):
        (tmp_path / one).write_bytes((file.parent / one).read_bytes())
    if content is None:
        (tmp_path / name).unlink()
    elif isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        np.save(tmp_path / name, content, allow_pickle=True)
    with pytest.raises(GatesError, match=words):
        PublishedForecast(tmp_path / "fengwu.onnx", CHANNELS)


def test_missing_packages(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"export needs onnxruntime"):
        PublishedForecast(file, CHANNELS)
