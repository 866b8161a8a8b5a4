"""``gates weather forecast``: models of every kind, from analyses to a store."""

import hashlib

import numpy as np
import pytest
import torch
import xarray as xr

from weather.models.fengwu.network import fengwu_preset
from weather.models.fengwu.trained_forecast import FengWuForecast, save_forecast
from weather.models.shallow_water.model import ShallowWater
from weather.state import SHALLOW_WATER, Normalizer

UNIT = {"truncation": 12, "num_latitudes": 16, "num_longitudes": 32}
NATURE = "runs/weather/unit/nature.zarr"


@pytest.fixture(scope="module")
def here(gates):
    """One member of the nature run as analyses, a model of the user, and a trained one."""
    folder = gates.folder
    with xr.open_zarr(folder / NATURE) as nature:
        nature.isel(number=1, drop=True).load().to_netcdf(folder / "an.nc", engine="h5netcdf")
    (folder / "own.py").write_text(
        "class Roll:\n    def __call__(self, x, hours):\n        return x.roll(1, -1)\n"
        "class Hot(Roll):\n    def __call__(self, x, hours):\n        return x * float('inf')\n"
        "def broken(x, hours):\n    raise RuntimeError('out of ideas')\n"
    )
    torch.manual_seed(0)
    network = fengwu_preset("unit", dim=4, depths=(1, 1), fuser_depth=1)
    torch.nn.init.normal_(network.decoders[0].recovery.weight, std=0.1)
    model = FengWuForecast(network, Normalizer(torch.zeros(3), torch.ones(3)), torch.ones(3))
    model.channels = SHALLOW_WATER
    run = folder / "trained/forecasts/fengwu-s0"
    run.mkdir(parents=True)
    save_forecast(run / "forecast.safetensors", model)
    return gates


def forecasts(here, output, *words):
    out = here.succeed(
        "weather", "forecast", "an.nc", "--hours", 24, "--output", output, *words
    ).out
    assert out.splitlines()[-1] == output
    with xr.open_zarr(here.folder / output, consolidated=True, decode_timedelta=True) as found:
        return out, found.load()


def state(dataset):
    names = ("height", "u_component_of_wind", "v_component_of_wind")
    return torch.from_numpy(np.stack([dataset[name].values for name in names], -3))


def test_the_model_of_a_configuration_and_the_built_in_one_agree(here):
    """And both with a call of the model, to the last bit."""
    _, found = forecasts(here, "f1.zarr", "--config", "unit")
    settings = '{"stirring": 5e-10, "relaxation_days": 4.0, "truncation": 12, '
    settings += '"num_latitudes": 16, "num_longitudes": 32}'
    words = ["--forecast", "shallow_water", "--forecast_arguments", settings]
    _, same = forecasts(here, "f2.zarr", *words)
    assert torch.equal(state(found), state(same))
    model = ShallowWater(**UNIT, stirring=5e-10, relaxation_days=4.0)
    with xr.open_dataset(here.folder / "an.nc") as analyses:
        x = state(analyses.isel(time=[-1]))
        assert found["time"].values == analyses["time"].values[-1:]
    with torch.no_grad():
        for lead in range(5):
            assert torch.equal(state(found)[:, lead], x)
            x = model(x, 6.0)
    assert "ShallowWater(" in found.attrs["forecast_model"]
    assert len(found.attrs["revision"]) >= 40


def test_a_run_of_train_forecast(here):
    words = ["--forecast", "trained", "--start", "[first, 2000-01-02T00]"]
    with xr.open_dataset(here.folder / "an.nc") as analyses:
        second = str(analyses["time"].values[1])[:16]
    words[-1] = f"[first, {second}]"
    out, found = forecasts(here, "f3.zarr", *words)
    assert "1 of 2 forecasts start from one state, since an.nc has none one step earlier" in out
    file = here.folder / "trained/forecasts/fengwu-s0/forecast.safetensors"
    assert found.attrs["forecast_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert found["height"].dims == ("time", "prediction_timedelta", "latitude", "longitude")
    assert found["height"].shape == (2, 5, 16, 32)
    assert not np.array_equal(found["height"][0, 1], found["height"][0, 0])


def test_a_model_of_the_user_is_given_what_the_store_holds(here):
    out, found = forecasts(here, "f4.zarr", "--forecast", "own.py:Roll", "--every", 12)
    assert "1 forecasts of 3 states of u, v, h" in out
    height = found["height"].values[0]
    assert np.array_equal(height[2], np.roll(height[0], 2, -1))


FAULTS = {
    "not finite": (
        ("an.nc", "--forecast", "own.py:Hot"),
        r"forecast of \S+, hour 0 to 6: --forecast 'own.py:Hot' returned values that are not fini",
    ),
    "a model that fails": (
        ("an.nc", "--forecast", "own.py:broken"),
        r"own.py:broken' refuses the states \(RuntimeError: out of ideas\): name",
    ),
    "no configuration": (("an.nc",), "--forecast model is that of a configuration: add --config"),
    "no model in it": (("an.nc", "--config", "era5_ensemble"), "this configuration has none"),
    "another grid": (
        ("an.nc", "--forecast", "shallow_water"),
        "an.nc has 16 latitudes .* expected 32 .* grid of the forecast model with `gates weather",
    ),
    "another model": (
        ("an.nc", "--forecast", "held_suarez"),
        "an.nc: variable surface_pressure, temperature is missing, found height",
    ),
    "no time": (("an.nc", "--forecast", "own.py:Roll", "--start", "[1999-01-01]"), "has no analy"),
    "hours": (("an.nc", "--forecast", "own.py:Roll", "--hours", "7"), "--hours 7 --every 6 cannot"),
    "argument": (
        ("an.nc", "--forecast", "shallow_water", "--forecast_arguments", '{"truncatoin": 3}'),
        "ShallowWater' cannot be imported .*truncatoin",
    ),
    "empty run": (("an.nc", "--forecast", "runs"), "runs holds no forecast model, expected one of"),
    "no analyses": (("a.nc", "--forecast", "own.py:Roll"), "a.nc: does not exist; did you mean an"),
    "taken": (
        ("an.nc", "--forecast", "own.py:Roll", "--output", "own.py"),
        "own.py exists: choose another --output",
    ),
    "itself": (
        ("an.nc", "--forecast", "own.py:Roll", "--output", "an.nc", "--overwrite_output"),
        "an.nc is the output an.nc: choose another --output",
    ),
    "forecasts": (("f4.zarr", "--forecast", "own.py:Roll"), "f4.zarr holds forecasts: select one"),
}


def test_faulty_calls_write_nothing(here, faulty_inputs):
    table = {
        name: (("weather", "forecast", *words), said) for name, (words, said) in FAULTS.items()
    }
    faulty_inputs(table, folder=here.folder)
