"""Faulty inputs of ``gates weather assimilate``: one line, exit code 2, nothing half written."""

import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from safetensors.torch import load_file, save_file

NATURE = "runs/weather/unit/nature.zarr"
WEIGHTS = "runs/weather/unit/weights/adas_increment-s0/weights.safetensors"
STORE, TABLE = ("--background", "good.nc"), ("--observations", "good.csv")
NETWORK = ("--method", "adas_increment")
ERA5 = ("--config", "era5_ensemble", "--method", "oi", "--observations", "good.csv")


@pytest.fixture(scope="module")
def folder(gates):
    """Good and damaged inputs next to the prepared run."""
    here = gates.folder
    with xr.open_zarr(here / NATURE) as nature:
        good = nature.isel(time=[-2, -1], number=1, drop=True).load()
    good.attrs.clear()
    good.to_netcdf(here / "good.nc", engine="h5netcdf")
    content = (here / "good.nc").read_bytes()
    (here / "truncated.nc").write_bytes(content[: len(content) // 2])
    holes = good.copy(deep=True)
    holes["height"][0, 3, 5] = np.nan
    holes.to_netcdf(here / "holes.nc", engine="h5netcdf")
    good.isel(time=[0, 0]).to_netcdf(here / "twice.nc", engine="h5netcdf")
    good.isel(longitude=slice(None, None, 2)).to_netcdf(here / "columns.nc", engine="h5netcdf")
    good.drop_vars("height").to_netcdf(here / "windy.nc", engine="h5netcdf")
    moved = good.assign_coords(latitude=good["latitude"] - 0.25)
    moved.to_netcdf(here / "moved.nc", engine="h5netcdf")
    single = {name: good[name].astype(np.float32) for name in ("latitude", "longitude")}
    good.assign_coords(single).to_netcdf(here / "single.nc", engine="h5netcdf")
    _era5_files(gates)
    _tables(here)
    _weights(here)
    _choices(gates)
    (here / "scalar.py").write_text("def model(states, hours):\n    return states.mean()\n")
    shutil.copytree(here / NATURE, here / "taken.zarr")
    return here


def _era5_files(gates):
    gates.weather("prepare", config="era5_ensemble")
    with xr.open_zarr(gates.folder / "runs/weather/era5_ensemble/era5_ensemble.zarr") as sample:
        good = sample.isel(time=[0], number=1, drop=True).load()
    good.isel(level=0, drop=True).to_netcdf(gates.folder / "flat.nc", engine="h5netcdf")
    cold = good.assign(temperature=good["temperature"] - 273.15)
    cold.to_netcdf(gates.folder / "celsius.nc", engine="h5netcdf")


def _tables(here):
    table = pd.read_parquet(here / "observations.parquet")
    good = table[["time", "latitude", "longitude", "variable", "value", "error"]].head(20)
    good.to_csv(here / "good.csv", index=False)
    good.assign(variable="temperature", value=12.0).to_csv(here / "celsius.csv", index=False)
    good.assign(variable="hight").to_csv(here / "unknown.csv", index=False)
    good.assign(time=good["time"].where(good.index != 3)).to_csv(here / "nat.csv", index=False)
    good.drop(columns="error").to_csv(here / "no_error.csv", index=False)
    good.assign(time="3000-01-01").to_csv(here / "late.csv", index=False)
    good.assign(time="1999-07-01").to_csv(here / "year.csv", index=False)
    good.assign(time="noon").to_csv(here / "noon.csv", index=False)
    good.head(0).to_csv(here / "empty.csv", index=False)
    (here / "text.parquet").write_text("no table")


def _weights(here):
    content = (here / WEIGHTS).read_bytes()
    (here / "truncated.safetensors").write_bytes(content[: len(content) // 2])
    tensors = load_file(here / WEIGHTS)
    name = next(n for n in tensors if n.startswith("network.") and tensors[n].ndim > 1)
    save_file(tensors | {name: torch.zeros(3)}, here / "other.safetensors")
    save_file(tensors | {name: tensors[name] * torch.nan}, here / "nan.safetensors")
    save_file(tensors, here / "no_json.safetensors", metadata={"form": "{"})
    (here / "damaged.ckpt").write_bytes(b"no checkpoint")
    torch.save({"state_dict": [1]}, here / "list.ckpt")


def _choices(gates):
    """The choice of OI in three runs: of another world, of a method that refuses it, damaged."""
    short = ["--only", "[oi]", "--trials", 1, "--cycles", 2, "--name"]
    gates.weather("tune", *short, "refused")
    runs = gates.folder / "runs/weather"
    chosen = "choices/oi-task-0.1_perfect-s0"
    for name in ("elsewhere", "cut"):
        shutil.copytree(runs / "refused" / chosen, runs / name / chosen)
    setting = {"setting": {"scale": -1.0, "length_km": -900.0}, "trials": [], "edges": []}
    (runs / "refused" / chosen / "result.json").write_text(json.dumps(setting))
    path = runs / "refused" / chosen / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"files": {}}))
    (runs / "cut" / chosen / "result.json").write_text('{"sett')
    record = json.loads((runs / "elsewhere" / chosen / "record.json").read_text())
    record["settings"]["data.source.init_args.world.init_args.seed"] = 9
    record["fingerprint"] = "0"
    (runs / "elsewhere" / chosen / "record.json").write_text(json.dumps(record))


def assimilate(*words):
    return ("assimilate", *words)


FAULTS = {
    "gross check of nothing": (
        assimilate(*STORE, *TABLE, "--gross_check", "0"),
        "--gross_check must be positive, found 0",
    ),
    "missing background": (
        assimilate("--background", "absent.nc", *TABLE),
        "absent.nc",
    ),
    "truncated NetCDF": (
        assimilate("--background", "truncated.nc", *TABLE),
        "truncated.nc.*(truncated|damaged)",
    ),
    "store without level": (
        assimilate("--background", "flat.nc", *ERA5),
        "flat.nc: has no dimension level for geopotential, temperature, found .*; name a store",
    ),
    "Celsius": (
        assimilate("--background", "celsius.nc", *ERA5),
        "temperature ranges from .* expected 150 to 350 K; it looks like degrees Celsius: add",
    ),
    "missing values": (
        assimilate("--background", "holes.nc", *TABLE),
        "holes.nc: height .*NaN.*; fill them",
    ),
    "duplicate times": (
        assimilate("--background", "twice.nc", *TABLE),
        "twice.nc: 1 of 2 times are duplicates, the first is .*; drop them",
    ),
    "grid of another size": (
        assimilate("--background", "columns.nc", *TABLE),
        "columns.nc has 16 latitudes from .* and 16 longitudes, expected 16 .* and 32: bring it to",
    ),
    "grid shifted from that of the configuration": (
        assimilate("--background", "moved.nc", *TABLE),
        "moved.nc has 16 .*, whose coordinates differ by up to 0.25 degrees: bring it to",
    ),
    "reports of another year": (
        assimilate(*STORE, "--observations", "year.csv"),
        r"year.csv: no report belongs to an analysis of 2000-.* 20 of 20 reports are left out: 20 "
        r"not within 3 h .*1999-07-01.*: nothing is written, give reports",
    ),
    "table without reports": (
        assimilate(*STORE, "--observations", "empty.csv"),
        "empty.csv holds no reports, expected some: nothing is written",
    ),
    "unreadable time": (
        assimilate(*STORE, "--observations", "noon.csv"),
        "20 of 20 observations have an unreadable time, the first is 'noon' in row 0; write it",
    ),
    "error of the background of no variable": (
        assimilate(*STORE, *TABLE, "--background_error", '{"hight": 1.0}'),
        "--background_error {'hight': 1.0} cannot be used: give positive numbers for height, u",
    ),
    "report of the future": (
        assimilate(*STORE, "--observations", "late.csv"),
        "late.csv: 20 of 20 observations have a bad time, .* a date from 1678 to 2261; correct",
    ),
    "missing variable": (
        assimilate("--background", "windy.nc", *TABLE),
        "windy.nc: variable height is missing, found u_component_of_wind, v_comp.*; choose",
    ),
    "missing table": (
        assimilate(*STORE, "--observations", "absent.csv"),
        "absent.csv does not exist; check the path",
    ),
    "table that is none": (
        assimilate(*STORE, "--observations", "text.parquet"),
        "text.parquet cannot be read as a table .* expected Parquet or CSV",
    ),
    "reports in degC": (
        assimilate(*STORE, "--observations", "celsius.csv"),
        "celsius.csv: temperature is mostly 12 to 12, expected 150 to 350 K; .*Celsius: add 273.15",
    ),
    "report without a time": (
        assimilate(*STORE, "--observations", "nat.csv"),
        "nat.csv: 1 of 20 observations have a bad time, the first is NaT in row 3.*; drop rows",
    ),
    "unknown variable": (
        assimilate(*STORE, "--observations", "unknown.csv"),
        "unknown.csv: variable hight is unknown; did you mean height?",
    ),
    "missing column": (
        assimilate(*STORE, "--observations", "no_error.csv"),
        "no_error.csv: observations lack the column error, found .*; rename or add it",
    ),
    "missing weights": (
        assimilate(*STORE, *TABLE, "--method", "adas_official"),
        "there are no weights of adas_official: train them with `gates weather fit`",
    ),
    "weights that do not exist": (
        assimilate(*STORE, *TABLE, *NETWORK, "--weights", "absent.safetensors"),
        "absent.safetensors.*; give a file",
    ),
    "truncated weights": (
        assimilate(*STORE, *TABLE, *NETWORK, "--weights", "truncated.safetensors"),
        "truncated.safetensors: not readable as safetensors weights",
    ),
    "weights of another configuration": (
        assimilate(*STORE, *TABLE, *NETWORK, "--weights", "other.safetensors"),
        "other.safetensors: weights of another configuration .*; give the configuration",
    ),
    "weights of another form": (
        assimilate(*STORE, *TABLE, "--method", "ungated", "--weights", WEIGHTS),
        "weights of another configuration .*gated is True, expected False",
    ),
    "damaged checkpoint": (
        assimilate(*STORE, *TABLE, *NETWORK, "--weights", "damaged.ckpt"),
        "damaged.ckpt is damaged or not a checkpoint",
    ),
    "weights that are not finite": (
        assimilate(*STORE, *TABLE, *NETWORK, "--weights", "nan.safetensors"),
        "nan.safetensors: 1 tensors are not finite, first network.*; give",
    ),
    "weights whose form is no JSON": (
        assimilate(*STORE, *TABLE, *NETWORK, "--weights", "no_json.safetensors"),
        "no_json.safetensors: not readable as safetensors weights .*; give",
    ),
    "checkpoint of a list": (
        assimilate(*STORE, *TABLE, *NETWORK, "--weights", "list.ckpt"),
        "list.ckpt is not a checkpoint of a training( run)?: give checkpoints/last.ckpt",
    ),
    "setting that its method refuses": (
        assimilate(*STORE, *TABLE, "--method", "oi", "--name", "refused"),
        "the setting of oi@0.1/perfect cannot be used .*: run `gates weather tune --overwrite`",
    ),
    "choice that is damaged": (
        assimilate(*STORE, *TABLE, "--method", "oi", "--name", "cut"),
        "cut/choices/oi-task-0.1_perfect-s0/result.json was changed after record.json .*: delete",
    ),
    "choice of another world": (
        assimilate(*STORE, *TABLE, "--method", "oi", "--name", "elsewhere"),
        r"elsewhere/choices/oi-task-0.1_perfect-s0 was made with other settings \(data.source."
        r"init_args.world.init_args.seed 9, now 0\): give those, or --name NEW",
    ),
    "network of other settings to assimilate with": (
        assimilate(*STORE, *TABLE, *NETWORK, "--data.steps", "15"),
        r"adas_increment-s0 was made with other settings \(data.steps 14, now 15\): give those",
    ),
    "unknown method": (
        assimilate(*STORE, *TABLE, "--method", "kalman"),
        "--method 'kalman' is unknown: choose from adas_increment, .*oi",
    ),
    "unknown task": (
        assimilate(*STORE, *TABLE, "--method", "oi", "--task", "0.1"),
        "--task '0.1' is unknown: choose from 0.1/perfect",
    ),
    "cycles without a forecast": (
        assimilate(*STORE, *TABLE, "--cycles", "2"),
        "--cycles 2 needs --forecast",
    ),
    "no cycles": (
        assimilate(*STORE, *TABLE, "--cycles", "0", "--forecast", "model"),
        "--cycles must be at least 1, found 0",
    ),
    "existing output": (
        assimilate(*STORE, *TABLE, "--output", "taken.zarr"),
        "taken.zarr exists: choose another --output or add --overwrite_output",
    ),
    "output below a file": (
        assimilate(*STORE, *TABLE, "--output", "good.csv/x.zarr"),
        "good.csv/x.zarr cannot be written, good.csv is a file and no folder: choose another",
    ),
    "forecast without a class": (
        assimilate(*STORE, *TABLE, "--forecast", "no.such.Model"),
        "--forecast 'no.such.Model' cannot be imported .* expected a class path",
    ),
    "forecast of another shape": (
        assimilate(*STORE, *TABLE, "--forecast", "scalar.py:model", "--cycles", "2"),
        r"--forecast 'scalar.py:model' returned the shape \(\), expected \(1, 3, 16, 32\)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_call_is_one_line(fault, gates, folder, faulty_inputs):
    words, expected = FAULTS[fault]
    config = () if "--config" in words else ("--config", "unit")
    command = ("weather", words[0], *config, *words[1:])
    faulty_inputs({fault: (command, expected)}, run=gates, folder=folder)


def test_the_good_files_are_good(gates, folder):
    """The same call as in the table, without the fault."""
    words = [*STORE, *TABLE, "--method", "oi", "--output", "fine.zarr"]
    assert gates.weather("assimilate", *words).out.splitlines()[-1] == "fine.zarr"
    shutil.rmtree(folder / "fine.zarr")


def test_coordinates_in_single_precision_are_those_of_the_configuration(gates, folder):
    words = ["--background", "single.nc", *TABLE, "--method", "oi", "--output", "single.zarr"]
    gates.weather("assimilate", *words)
    with xr.open_zarr(folder / "single.zarr") as found, xr.open_zarr(folder / NATURE) as nature:
        for name in ("latitude", "longitude"):
            assert np.array_equal(found[name], nature[name])
    shutil.rmtree(folder / "single.zarr")


def test_a_store_is_replaced_only_when_asked(gates, folder):
    words = [*STORE, *TABLE, "--method", "oi", "--output", "replaced.zarr"]
    shutil.copytree(folder / "taken.zarr", folder / "replaced.zarr")
    gates.weather("assimilate", *words, "--overwrite_output")
    with xr.open_zarr(folder / "replaced.zarr") as found:
        assert found.sizes["time"] == 2
    json.loads((folder / "replaced.zarr" / ".zmetadata").read_text())
    shutil.rmtree(folder / "replaced.zarr")


@pytest.mark.parametrize(
    ("target", "value", "message"),
    [
        (
            "weather.baselines.optimal_interpolation.OptimalInterpolation.analyze",
            lambda self, background, observations: background * torch.nan,
            "1 of 2 analyses are not finite, the first of .*: check the weights",
        ),
        (
            "weather.experiments.twin.twin_experiment.TwinExperiment.background_error",
            lambda source, task: torch.tensor([1.0, torch.nan, 0.0]),
            "the background error is .*nan, 0.0.*, expected positive numbers: give",
        ),
    ],
)
def test_what_is_not_finite_is_not_written(gates, folder, monkeypatch, target, value, message):
    monkeypatch.setattr(target, value)
    words = [*STORE, *TABLE, "--method", "oi", "--output", "not_finite.zarr"]
    result = gates.refuse("weather", "assimilate", "--config", "unit", *words)
    assert re.search(message, result), result
    assert not (folder / "not_finite.zarr").exists()
