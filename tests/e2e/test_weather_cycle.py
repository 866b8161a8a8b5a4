"""``gates weather cycle``: a folder of reports, a model and a method become analyses."""

import hashlib
import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest
import xarray as xr

NATURE = "runs/weather/unit/nature.zarr"
WEIGHTS = "runs/weather/unit/weights/adas_increment-s0/weights.safetensors"


@pytest.fixture(scope="module")
def here(gates):
    """Reports of six times of nature, two of which have none; another member is the background."""
    folder = gates.folder
    words = ["--stations", 60, "--time", -6, "--times", 6, "--output", "all.csv"]
    gates.weather("observe", *words)
    table = pd.read_csv(folder / "all.csv")
    nearest = pd.to_datetime(table["time"]).dt.round("6h")
    times = sorted(nearest.unique())
    (folder / "reports").mkdir()
    for number in (0, 1, 3, 5):
        table[nearest == times[number]].to_csv(folder / f"reports/{number}.csv", index=False)
    with xr.open_zarr(folder / NATURE) as nature:
        first = nature.isel(time=slice(-6, -3), number=2, drop=True).load()
    first.to_netcdf(folder / "first.nc", engine="h5netcdf")
    (folder / "own.py").write_text(
        "class Late:\n    calls = 0\n    def __call__(self, x, hours):\n"
        "        Late.calls += 1\n        return x * (1e3 if Late.calls == 3 else 1)\n"
    )
    return gates


CALL = ("--background", "first.nc", "--observations", "reports", "--start", "first")


def cycle(here, output, *words):
    out = here.weather("cycle", *CALL, "--output", output, *words).out
    assert out.splitlines()[-1] == output
    stores = []
    for name in ("analyses.zarr", "backgrounds.zarr"):
        with xr.open_zarr(here.folder / output / name, consolidated=True) as found:
            stores.append(found.load())
    return out, *stores


def contents(path):
    return {p.relative_to(path): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("method", ["adas_increment", "oi", "free_run"])
def test_methods_cycle(here, method):
    out, analyses, backgrounds = cycle(here, f"c-{method}", "--method", method)
    assert "6 cycles, " in out
    assert "2 cycles without observations" in out
    assert analyses.sizes["time"] == 6
    same = [np.array_equal(a, b) for a, b in
            zip(analyses["height"].values, backgrounds["height"].values, strict=True)]  # fmt: skip
    free = method == "free_run"
    assert same == [free, free, True, free, True, free]
    with xr.open_zarr(here.folder / NATURE) as nature:
        truth = nature["height"].isel(time=slice(-6, None), number=1).values
    error = np.sqrt(((analyses["height"].values - truth) ** 2).mean((1, 2)))
    if method == "oi":
        assert error[-1] < 0.9 * error[0]
    rows = pd.read_csv(here.folder / f"c-{method}/departures.csv")
    seen = rows[rows["used"] > 0]
    assert (len(rows), np.array_equal(seen["oa_rms"], seen["ob_rms"])) == (18, free)
    if method == "oi":
        assert (seen["oa_rms"] < seen["ob_rms"]).mean() > 0.8


def test_what_the_stores_say(here):
    _, analyses, backgrounds = cycle(
        here, "said", "--gross_check", 4, "--cycles", 2, "--method", "adas_increment"
    )
    facts = analyses.attrs
    assert facts == backgrounds.attrs
    assert (facts["method"], facts["forecast"], facts["gross_check"]) == (
        "adas_increment",
        "model",
        4,
    )
    digest = hashlib.sha256((here.folder / WEIGHTS).read_bytes()).hexdigest()
    assert facts["weights_sha256"] == digest
    assert set(json.loads(facts["background_error_sd"])) == {"h", "u", "v"}
    assert len(facts["used_cells"]) == len(facts["rejected_cells"]) == 2
    pairs = zip(facts["used_cells"], facts["rejected_cells"], strict=True)
    assert [used + rejected for used, rejected in pairs] == facts["observed_cells"]
    assert len(facts["revision"]) >= 40
    assert "ShallowWater(" in facts["forecast_model"]
    assert len(facts["observations_sha256"]) == 64


def test_the_first_analyses_are_those_of_assimilate(here):
    """The same reports, method and model: `assimilate` starts from the last time of its store."""
    _, analyses, _ = cycle(here, "as", "--method", "oi", "--cycles", 4)
    with xr.open_dataset(here.folder / "first.nc") as first:
        first.isel(time=[0]).load().to_netcdf(here.folder / "one.nc", engine="h5netcdf")
    tables = [pd.read_csv(path) for path in sorted((here.folder / "reports").glob("*.csv"))]
    pd.concat(tables).to_csv(here.folder / "together.csv", index=False)
    words = ["--background", "one.nc", "--observations", "together.csv", "--method", "oi"]
    words += ["--forecast", "model", "--cycles", 4, "--output", "assimilated.zarr"]
    here.weather("assimilate", *words)
    with xr.open_zarr(here.folder / "assimilated.zarr") as found:
        for name in ("height", "u_component_of_wind"):
            assert np.array_equal(found[name], analyses[name])
        assert found.attrs["used_cells"] == analyses.attrs["used_cells"]
        assert len(found.attrs["revision"]) >= 40
        assert "background_error_sd" in found.attrs


@pytest.mark.costly("a cycle that is killed and continued")
def test_a_killed_command_ends_with_the_same_bits(here, monkeypatch):
    from weather.operations import long_cycle

    network = ("--method", "adas_increment")
    cycle(here, "whole", *network)
    child = os.fork()
    if not child:
        save, calls = long_cycle.Partial.save, []

        def dying(self, state):
            calls.append(state)
            if len(calls) == 4:
                os._exit(9)
            save(self, state)

        long_cycle.Partial.save = dying
        here.weather("cycle", *CALL, "--output", "broken", *network)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (here.folder / "broken").exists()
    assert (here.folder / ".broken.partial").is_dir()
    assert "broken was begun with other settings (" in here.refuse(
        "weather", "cycle", "--config", "unit", *CALL, "--output", "broken", "--method", "oi"
    )
    cycle(here, "broken", *network)
    assert contents(here.folder / "broken") == contents(here.folder / "whole")


FAULTS = {
    "empty folder": (("--observations", "bare"), "bare holds no table", {"bare/notes.txt": "x"}),
    "other time": (
        ("--observations", "afterwards.csv"),
        "afterwards.csv: no report belongs to an analysis of .* 2 of 2 reports are left out: 2 not",
        {"afterwards.csv": "time,latitude,longitude,variable,value,error\n"
                     "1999-01-01,10,20,height,9000,10\n1999-01-02,10,20,height,9000,10\n"},
    ),
    "faulty table in the folder": (
        ("--observations", "mixed"),
        "mixed/b.csv: observations lack the column",
        {"mixed/a.csv": "time,latitude,longitude,variable,value,error\n"
                        "2000-01-01,10,20,height,9000,10\n", "mixed/b.csv": "a,b\n1,2\n"},
    ),
    "no such start": (("--start", "1999-01-01"), "first.nc: has no analysis of 1999-01-01, 3 from"),
    "all starts": (("--start", "all"), "--start all names 3 times: give one"),
    "no cycles": (("--cycles", "0"), "--cycles must be at least 1, found 0"),
    "no limit": (("--divergence_limit", "0"), "--divergence_limit must be positive, found 0"),
    "no forecast": (("--forecast", "no.such.Model"), "'no.such.Model' cannot be imported"),
    "another grid": (("--forecast", "shallow_water"), "expected 32 from .* grid of --forecast"),
    "other channels": (("--forecast", "held_suarez"), "forecasts sp, t1, .* expected h, u, v:"),
    "taken": (("--output", "reports"), "reports exists: choose another --output"),
    "unknown method": (("--method", "kalman"), "--method 'kalman' is unknown: choose from"),
    "absent table": (("--observations", "absent.csv"), "absent.csv does not exist"),
}  # fmt: skip


@pytest.mark.slow
def test_faulty_calls_write_nothing(here, faulty_inputs):
    table = {
        name: (("weather", "cycle", "--config", "unit", *CALL, *words), said, *files)
        for name, (words, said, *files) in FAULTS.items()
    }
    faulty_inputs(table, folder=here.folder)


def test_a_diverged_cycle_keeps_what_was_good(here):
    words = ["--config", "unit", *CALL, "--method", "oi", "--output", "lost"]
    words += ["--forecast", "own.py:Late"]
    result = here.refuse("weather", "cycle", *words)
    assert "cycle 4 of 6, " in result
    assert "the background has diverged: " in result
    assert result.endswith("; 3 cycles are kept, --cycles 3 finishes with them")
    assert "3 cycles, " in here.succeed("weather", "cycle", *words, "--cycles", 3).out
    shutil.rmtree(here.folder / "lost")
