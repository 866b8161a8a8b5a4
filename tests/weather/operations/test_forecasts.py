"""Forecasts that are written start by start, and models by name."""

import os

import numpy as np
import pytest
import torch
import xarray as xr
import zarr

from core_gates.errors import GatesError
from weather.cycle import FramesForecast, advance
from weather.data.axes import to_dataset, to_tensor
from weather.data.store import open_wb2
from weather.data.writing import write_wb2
from weather.grid import regular_grid
from weather.models.fengwu.network import fengwu_preset
from weather.models.fengwu.trained_forecast import FengWuForecast, save_forecast
from weather.operations.forecasts import (
    Leads,
    choose_starts,
    find_forecast,
    store_channels,
    write_forecasts,
)
from weather.state import SHALLOW_WATER, ChannelSpec, Normalizer

GRID = regular_grid(6, 8, poles=False)
CHANNELS = ChannelSpec(("2m_temperature",), ("geopotential", "temperature"), (850, 500))
TIMES = np.datetime64("2020-02-28T18", "ns") + np.arange(3) * np.timedelta64(6, "h")


def states(*leading):
    base = torch.tensor([280.0, 15000, 55000, 280, 250])[:, None, None]
    return base + torch.randn(*leading, 5, 6, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=[None, 2], ids=["single", "members"])
def analyses(request, tmp_path):
    leading = (3,) if request.param is None else (3, request.param)
    data = to_dataset(states(*leading), CHANNELS, GRID, times=TIMES)
    with open_wb2(write_wb2(data, tmp_path / "a.zarr"), CHANNELS) as opened:
        yield opened


class Roll:
    """Shift by a column every three hours."""

    def __call__(self, x, hours):
        return x.roll(int(hours) // 3, -1)


class Linear:
    """The trend of two frames, 6 hours apart; a single one stays."""

    frames, step_hours = 2, 6.0

    def __init__(self):
        self.seen = []

    def __call__(self, x, hours, previous=None):
        assert hours == 6
        self.seen.append(previous is not None)
        return x if previous is None else 2 * x - previous


A_DAY = Leads(24, 6)


def run(analyses, forecast, path, *, leads=A_DAY, starts=TIMES[1:], **options):
    return write_forecasts(
        analyses, CHANNELS, forecast, leads, path,
        starts=starts, settings={"model": "m"}, attributes={"method": "forecast"}, **options,
    )  # fmt: skip


def test_every_lead_of_every_start(analyses, tmp_path):
    assert run(analyses, Roll(), tmp_path / "f.zarr") == []
    first = to_tensor(analyses, CHANNELS)
    with open_wb2(tmp_path / "f.zarr", CHANNELS) as opened:
        found = to_tensor(opened, CHANNELS)
        np.testing.assert_array_equal(opened["time"], TIMES[1:])
        hours = opened["prediction_timedelta"].values / np.timedelta64(1, "h")
        assert hours.tolist() == [0, 6, 12, 18, 24]
    for lead in range(5):
        assert torch.equal(found[:, lead], first[1:].roll(2 * lead, -1))


def test_it_is_what_writing_all_at_once_gives(analyses, tmp_path):
    """The same arrays, types and attributes as `write_wb2`."""
    run(analyses, Roll(), tmp_path / "f.zarr")
    with xr.open_zarr(tmp_path / "f.zarr", decode_timedelta=True) as streamed:
        write_wb2(streamed.load(), tmp_path / "once.zarr")
    names = ("f.zarr", "once.zarr")
    groups = [zarr.open_consolidated(tmp_path / name, zarr_format=2) for name in names]
    arrays = [dict(group.arrays()) for group in groups]
    assert arrays[0].keys() == arrays[1].keys()
    for name, one in arrays[0].items():
        other = arrays[1][name]
        assert one.metadata.to_dict() == other.metadata.to_dict(), name
        np.testing.assert_array_equal(one[:], other[:])
    assert dict(groups[0].attrs) == dict(groups[1].attrs)


def test_a_model_of_two_frames_gets_them(analyses, tmp_path):
    model = Linear()
    alone = run(analyses, model, tmp_path / "f.zarr", leads=Leads(24, 12), starts=TIMES[:2])
    assert alone == [TIMES[0]]
    assert model.seen == [False, True, True, True] + 4 * [True]
    first = to_tensor(analyses, CHANNELS)
    with open_wb2(tmp_path / "f.zarr", CHANNELS, check=False) as opened:
        found = to_tensor(opened, CHANNELS)
    assert torch.equal(found[0, 2], first[0])
    trend = first[1] - first[0]
    torch.testing.assert_close(found[1, 1], first[1] + 2 * trend, rtol=0, atol=0.02)
    torch.testing.assert_close(found[1, 2], first[1] + 4 * trend, rtol=0, atol=0.05)


@pytest.mark.parametrize("calls", [pytest.param(2, marks=pytest.mark.slow), 5, 7])
def test_a_killed_call_is_continued(analyses, tmp_path, calls):
    """Killed within the first start, within the second, and at its end."""
    run(analyses, Roll(), tmp_path / "whole.zarr")

    class Counted(Roll):
        def __init__(self, last=None):
            self.calls, self.last = 0, last

        def __call__(self, x, hours):
            self.calls += 1
            if self.calls == self.last:
                os._exit(9)
            return super().__call__(x, hours)

    child = os.fork()
    if not child:
        run(analyses, Counted(calls), tmp_path / "f.zarr")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (tmp_path / "f.zarr").exists()
    rest = Counted()
    run(analyses, rest, tmp_path / "f.zarr")
    assert rest.calls == (8 if calls <= 4 else 4)
    assert contents(tmp_path / "f.zarr") == contents(tmp_path / "whole.zarr")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zarr", "f.zarr", "whole.zarr"]


def contents(path):
    return {p.relative_to(path): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_a_forecast_that_fails_is_named_and_nothing_is_written(analyses, tmp_path, refused):
    class Failing(Roll):
        def __call__(self, x, hours):
            raise GatesError("not finite")

    refused(
        r"forecast of 2020-02-29T00:00:00, hour 0 to 6: not fin",
        run,
        analyses,
        Failing(),
        tmp_path / "f.zarr",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a.zarr"]


@pytest.mark.parametrize(
    ("leads", "model", "words"),
    [
        (Leads(24, 5), Roll(), "--hours 24 --every 5 cannot be used: give positive hours"),
        (Leads(0, 6), Roll(), "cannot be used"),
        (Leads(24, -6), Roll(), "cannot be used"),
        (Leads(float("nan"), 6), Roll(), "cannot be used"),
        (Leads(24, 4), Linear(), "--every 4 is no multiple of the 6 h that the model steps"),
    ],
)
def test_leads_that_do_not_fit(leads, model, words, refused):
    refused(words, leads.check, model)


def test_starts(analyses, refused):
    def starts(*wanted):
        return choose_starts(analyses, wanted, "a.zarr")

    assert (starts("all"), starts("first", "2020-02-29T00")) == (list(TIMES), list(TIMES[:2]))
    assert starts("last") == list(TIMES[2:])
    for wanted, words in (
        (["2020-03-01"], r"^a.zarr: has no analysis of 2020-03-01, 3 from 2020-02-28T18:00 to"),
        (["noon"], "--start 'noon' is no time, write it as"),
        (["last", "last"], "names a time twice"),
        ([], "or none"),
    ):
        refused(words, starts, *wanted)


def test_all_fields_of_a_store_are_channels_in_a_known_order(tmp_path):
    extra = ChannelSpec(("zeta", "2m_temperature"), ("temperature", "geopotential"), (850, 500))
    data = to_dataset(torch.full((1, 6, 6, 8), 280.0), extra, GRID, times=TIMES[:1])
    with open_wb2(write_wb2(data, tmp_path / "b.zarr"), check=False) as opened:
        found = store_channels(opened)
    assert found == ChannelSpec(("2m_temperature", "zeta"), CHANNELS.upper, (500, 850))


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
def test_states_that_it_cannot_take(file, change, words, refuses):
    refuses(
        GatesError,
        (words, lambda: found(file)(change(torch.randn(SHAPE)), 6.0)),
        ("multiple of the step of 6 h, got 5", lambda: found(file)(torch.randn(SHAPE), 5.0)),
    )


def test_files_that_are_none(tmp_path, refuses):
    refuses(
        GatesError,
        ("not readable as a forecast model", lambda: found(tmp_path / "absent.safetensors")),
        (r"absent\.onnx does not exist", lambda: found(tmp_path / "absent.onnx")),
    )


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


def test_models_of_a_user(tmp_path, refused):
    path = tmp_path / "own.py"
    path.write_text(MODELS)
    x = torch.ones(SHAPE)
    one = found(f"{path}:Double")
    assert not isinstance(one, FramesForecast)
    assert torch.equal(advance(one, x, 6.0, 0 * x), 2 * x)
    assert torch.equal(advance(found(f"{path}:Lazy"), x, 6.0, 0 * x), 0 * x)
    refused(r"returned the shape \(1, 3, 16, 32\), expected \(2, 3", found(f"{path}:short"), x, 6.0)
