"""What ``gates weather assimilate`` does by default on the shipped real fields."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import weather
from weather.operations.analyses import DEFAULT_METHOD

pytestmark = pytest.mark.fault("46 W default")
SCORES = Path(weather.__file__).parent / "weights/era5_ensemble/scores.json"


def errors_of(task=None):
    """Geometric means over fields and tasks, by method."""
    logs = {}
    for row in json.loads(SCORES.read_text())["rows"]:
        if task in (None, row["task"]):
            logs.setdefault(row["method"], []).append(math.log(row["value"]))
    return {name: math.exp(np.mean(found)) for name, found in logs.items()}


def test_the_default_errs_least_on_the_held_out_fields():
    errors = errors_of()
    assert {"oi", "inverse_distance", "letkf", "adas_increment", "ungated"} < set(errors)
    assert min(errors, key=errors.get) == DEFAULT_METHOD
    assert min(value for name, value in errors.items() if name != DEFAULT_METHOD) > (
        1.02 * errors[DEFAULT_METHOD])  # fmt: skip


@pytest.fixture(scope="module")
def real(gates_in, tmp_path_factory):
    """``real(*words)`` assimilates 500 stations of member 1; the lines, errors before and after."""
    gates = gates_in(tmp_path_factory.mktemp("real"))
    store = gates.folder / gates.weather("prepare", config="era5_ensemble").out.splitlines()[-1]
    gates.weather("observe", config="era5_ensemble")
    sample = xr.open_zarr(store).load()
    earlier = sample.isel(time=[2]).mean("number").assign_coords(time=sample["time"][[3]])
    earlier.to_netcdf(gates.folder / "earlier.nc", engine="h5netcdf")
    weights = np.cos(np.deg2rad(sample["latitude"]))

    def assimilate(background, *words):
        words = (*words, "--background", {"now": store, "earlier": "earlier.nc"}[background])
        words += ("--observations", "observations.parquet", "--overwrite_output")
        out = gates.weather("assimilate", *words, config="era5_ensemble").out
        before = {"now": sample.isel(time=3).mean("number"), "earlier": earlier.isel(time=0)}
        with xr.open_zarr(gates.folder / "analysis.zarr") as found:
            after, facts = found.isel(time=-1).load(), found.attrs
        truth = sample.isel(time=3, number=1)
        squares = [
            ((fields - truth)["geopotential"].sel(level=500) ** 2).weighted(weights).mean()
            for fields in (before[background], after)
        ]
        return out, facts, [float(one) ** 0.5 for one in squares]

    assimilate.gates = gates
    return assimilate


def test_a_good_background_stays_good(real):
    """The mean of the members at the same time errs by 14 m2 s-2, of the reports by 50."""
    out, facts, (before, after) = real("now")
    assert (facts["method"], facts["task"]) == ("oi", "ensemble/0.1")
    assert "--task ensemble/0.1: its background error fits the reports best" in out
    assert after <= before < 15
    assert "warning" not in out


def test_an_old_background_is_improved_by_the_first_task(real):
    out, facts, (before, after) = real("earlier")
    assert (facts["method"], facts["task"]) == ("oi", "persistence/0.1")
    assert "--task" not in out
    assert "errs" not in out  # a method that did not lose is taken in silence
    assert after < 0.75 * before


def test_a_task_that_was_asked_for_is_taken_and_what_does_not_fit_is_said(real):
    out, facts, (before, after) = real("now", "--task", "persistence/0.1")
    assert facts["task"] == "persistence/0.1"
    assert after > 2 * before
    (line,) = [line for line in out.splitlines() if line.startswith("warning")]
    assert "0.14 (z500)" in line


@pytest.mark.parametrize(("task", "method"), [
    ("persistence/0.1", "adas_increment"), ("ensemble/0.1", "ungated"),
    ("persistence/0.1", "inverse_distance"), ("persistence/0.01", "oi"),
    ("persistence/0.1", "adas_official"), ("persistence/0.1", "background"),
    ("persistence/0.1", "inverse_distance_of_observations"),
])  # fmt: skip
def test_a_method_that_lost_on_held_out_fields_is_told_so(real, task, method):
    out, _, _ = real("earlier", "--method", method, "--task", task)
    errors = {n: e for n, e in errors_of(task).items() if n != "letkf"}
    best = min(errors, key=errors.get)
    assert best != method
    said = f"{method} errs {errors[method] / errors[best]:.2f} times as much as {best} on the held-"
    assert said in out
    assert f"--method {best}" in out


def test_own_scores_come_before_those_that_ship(real):
    scores = json.loads(SCORES.read_text())
    for row in scores["rows"]:
        row["value"] *= 0.5 if row["method"] == "inverse_distance" else 1
    path = real.gates.folder / "runs/weather/era5_ensemble/scores.json"
    path.write_text(json.dumps(scores))
    errors = errors_of("persistence/0.1")
    out = real("earlier")[0]
    path.unlink()
    ratio = errors["oi"] / errors["inverse_distance"] * 2
    assert f"oi errs {ratio:.2f} times as much as inverse_distance on the held-out data" in out


@pytest.mark.fault("46 W1")
@pytest.mark.parametrize("method", ["adas_oi", "damped_oi", "bogus"])
def test_methods_that_are_refused_are_told_where_they_are_and_what_runs_here(real, method):
    words = ("--background", "earlier.nc", "--observations", "observations.parquet",
             "--output", "none.zarr")  # fmt: skip
    refused = real.gates.refuse(
        "weather", "assimilate", "--config", "era5_ensemble", *words, "--method", method
    )
    assert ("osse, outage, mixed have it" in refused) == (method != "bogus")
    names = refused.rpartition("choose from ")[2].split(", ")
    assert set(names) == {
        "adas_increment", "ungated", "adas_official", "background", "inverse_distance",
        "inverse_distance_of_observations", "oi",
    }  # fmt: skip


def test_weights_that_the_method_does_not_read_are_refused(real):
    words = ("--background", "earlier.nc", "--observations", "observations.parquet",
             "--output", "none.zarr", "--weights", "my.safetensors")  # fmt: skip
    assert (
        "--weights is for a network, not for oi: add --method adas_increment"
        in real.gates.refuse("weather", "assimilate", "--config", "era5_ensemble", *words)
    )
