"""``gates weather fit`` on the user's own store, and all that follows from it, without Python."""

import json
import shutil

import numpy as np
import pytest
import xarray as xr
import yaml
import zarr

from benchmarks.weather.synthetic_store import main as write_store
from benchmarks.weather.synthetic_store import write_synthetic_store

OWN = ["--data.store", "own.zarr", "--data.background", "12h"]
SHORT = ["--data.steps", 4, "--trainer.val_check_interval", 2, "--data.validation_steps", 1]
CONFIG = "reanalysis"


@pytest.fixture(scope="module")
def own(gates_in, tmp_path_factory):
    """A run folder with a small store and a network that saw four steps."""
    run = gates_in(tmp_path_factory.mktemp("own"))
    write_synthetic_store(run.folder / "own.zarr", frames=100, rows=17, columns=32)
    run.fitted = run.weather("fit", *OWN, *SHORT, config=CONFIG)
    return run


def test_fit_takes_everything_from_the_store(own):
    folder = own.folder / "runs/weather/reanalysis"
    assert own.fitted.out.splitlines()[-1].endswith("weights/adas_increment-s0/weights.safetensors")
    network = yaml.safe_load((folder / "config.yaml").read_text())["model"]["network"]["init_args"]
    assert network["grid_shape"] == [17, 32]
    assert (network["num_surface"], network["num_upper"], network["num_levels"]) == (4, 4, 4)
    assert (network["patch_size"], network["window_size"]) == ([2, 2], [2, 2, 2])
    assert sorted(p.name for p in (folder / "cache").iterdir()) == [
        "background_error.json", "truth.zarr",
    ]  # fmt: skip
    record = json.loads((folder / "record.json").read_text())
    assert not any("own.zarr" in str(value) for value in record["settings"].values())
    assert len(record["settings"]["data.digest"][0]) == 64
    assert record["objects"]


@pytest.mark.slow
def test_what_fit_made_is_evaluated_and_reported(own):
    out = own.weather("evaluate", *OWN, *SHORT, "--quick", config=CONFIG).out
    assert "of `fit`, with the optimizer of the configuration: adas_increment" in out
    assert "missing network" not in out
    scores = json.loads((own.folder / "runs/weather/reanalysis/scores.json").read_text())
    assert {row["task"] for row in scores["rows"]} == {"0.1", "0.01"}
    assert {row["method"] for row in scores["rows"]} == {
        "background", "inverse_distance", "oi", "climatology", "adas_increment",
    }  # fmt: skip
    assert {data["name"] for data in scores["data"]} == {"own.zarr"}
    assert "blocks of five days, which n counts" in " ".join(scores["notes"])
    page = own.weather("report", *OWN, *SHORT, config=CONFIG).out.splitlines()[-1]
    assert "adas_increment, last of the held-out times" in (own.folder / page).read_text()


def test_what_fit_made_assimilates_reports(own):
    own.weather("observe", *OWN, *SHORT, "--time", "-3", "--stations", 80, config=CONFIG)
    words = [*OWN, *SHORT, "--observations", "observations.parquet"]
    out = own.weather("assimilate", *words, "--method", "adas_increment", config=CONFIG).out
    time = np.datetime64("2019-01-01") + 97 * np.timedelta64(6, "h")
    assert f"{np.datetime_as_string(time, unit='m')}  " in out
    with (
        xr.open_zarr(own.folder / "analysis.zarr") as found,
        xr.open_zarr(own.folder / "own.zarr") as truth,
    ):
        assert found["time"].values.tolist() == [time.astype("datetime64[ns]").item()]
        assert found.attrs["background"] == "12h, of own.zarr"
        before = truth["geopotential"].isel(time=95).transpose("level", "latitude", "longitude")
        before = before.sortby("latitude", ascending=False)
        before = before.assign_coords(longitude=before["longitude"] % 360).sortby("longitude")
        assert 0 < np.abs(found["geopotential"].values[0] - before.values).max() < 5000
    store = own.weather("assimilate", *words, "--background", "own.zarr",
                        "--output", "other.zarr", config=CONFIG).out  # fmt: skip
    assert store.splitlines()[-1] == "other.zarr"
    with xr.open_zarr(own.folder / "other.zarr") as found:
        assert found.sizes["time"] == 100


def test_of_a_large_background_only_what_has_reports_is_read(own, monkeypatch):
    monkeypatch.setattr("weather.operations.analyses.LARGE_BYTES", 1)
    own.weather("observe", *OWN, *SHORT, "--time", "-3", "--stations", 80, "--output", "few.csv",
                config=CONFIG)  # fmt: skip
    words = [*OWN, *SHORT, "--observations", "few.csv", "--background", "own.zarr", "--output"]
    own.weather("assimilate", *words, "few.zarr", "--method", "inverse_distance", config=CONFIG)
    with xr.open_zarr(own.folder / "few.zarr") as found:
        assert found.sizes["time"] == 1
    cycle = [str(word) for word in (*OWN, *SHORT, *words[-5:-1])]
    assert "no report belongs to an analysis of 2019-01-25T18:00" in own.refuse(
        "weather",
        "assimilate",
        "--config",
        CONFIG,
        *cycle,
        "--task",
        "0.1",
        "--output",
        "none.zarr",
        "--forecast",
        "numpy.copy",
    )


def test_a_model_by_name_gives_backgrounds(own):
    (own.folder / "still.py").write_text("def model(states, hours):\n    return states + 0.0\n")
    words = ["--data.store", "own.zarr", "--data.background", "still.py:model", "--name", "still"]
    words += ["--data.lead_hours", 12]
    assert "caching backgrounds" in own.weather("fit", *words, *SHORT, config=CONFIG).out
    errors = [
        json.loads((own.folder / f"runs/weather/{name}/cache/background_error.json").read_text())
        for name in ("still", "reanalysis")
    ]
    np.testing.assert_allclose(errors[0]["background_sd"], errors[1]["background_sd"], rtol=1e-6)


def broken(folder, change):
    def write(path):
        shutil.copytree(folder / "own.zarr", path)
        change(path)

    return write


def nan(path):
    zarr.open_array(path / "2m_temperature", mode="r+")[40, 3, 3] = -(2**15)


def half_written(path):
    for chunk in (path / "temperature").glob("7*"):
        chunk.unlink()


def cut_off(path):
    chunk = next((path / "temperature").glob("30.*"))
    chunk.write_bytes(chunk.read_bytes()[:40])


def coarse(folder):
    def write(path):
        with xr.open_zarr(folder / "own.zarr", chunks=None) as stored:
            stored.isel(longitude=slice(None, None, 2)).drop_encoding().to_zarr(
                path, zarr_format=2, consolidated=True
            )

    return write


@pytest.mark.slow
def test_stores_that_cannot_be_used_are_refused(own, faulty_inputs):
    def fit(store="bad.zarr", *words):
        return ("weather", "fit", "--config", CONFIG, "--name", "bad", "--data.store", store,
                "--data.background", "12h", *words)  # fmt: skip

    def copied(change):
        return {"bad.zarr": broken(own.folder, change)}

    gone = "no store was given, .* add --data.store X.zarr"
    table = {
        "no store": (("weather", "fit", "--config", CONFIG, "--name", "bad"), gone),
        "absent store": (fit("nowhere.zarr"), "nowhere.zarr: does not exist"),
        "missing level": (
            fit("own.zarr", "--data.levels", "[500, 925]"),
            "own.zarr: level 925 is missing, found .*; choose levels that exist",
        ),
        "missing variable": (
            fit("own.zarr", "--data.variables", "[salinity]"),
            "variable salinity is missing, found .*; choose variables",
        ),
        "NaN in a channel": (
            fit(), "bad.zarr: t2m is missing .NaN. in 0.184 % .* 2019-01-11T00.*fill them",
            copied(nan),
        ),
        "half-written store": (
            fit(), "bad.zarr: t300 is missing .NaN. in 100 % .*write the store again, it may be",
            copied(half_written),
        ),
        "damaged chunk": (
            fit(), "bad.zarr: temperature cannot be read: .*a chunk is damaged", copied(cut_off),
        ),
        "no store at all": (fit(), "bad.zarr: is neither Zarr", {"bad.zarr": "no store"}),
        "two grids": (
            fit("own.zarr", "--data.background", "bad.zarr"),
            "bad.zarr has 17 latitudes and 16 longitudes .*bring both to one grid",
            {"bad.zarr": coarse(own.folder)},
        ),
        "no model": (
            fit("own.zarr", "--data.background", "still.py:absent"),
            "--data.background 'still.py:absent' cannot be imported",
            {"still.py": "def model(states, hours):\n    return states + 0.0\n"},
        ),
        "no earlier state": (
            fit("own.zarr", "--data.background", "7h"), "no time of training has a background",
        ),
        "periods that overlap": (
            fit("own.zarr", "--data.validation", "[2019-01-05]", "--data.held_out", "[2019-01]"),
            "the period 2019-01 overlaps one that validates: choose another",
        ),
        "density": (
            fit("own.zarr", "--data.max_density", "3"), "need 0 < min_density <= max_density <= 1",
        ),
    }  # fmt: skip

    faulty_inputs(table, run=own, folder=own.folder)


def test_the_synthetic_store_is_packed_and_whole(tmp_path, capsys):
    path = tmp_path / "small.zarr"
    assert write_store([str(path), "--frames", "23", "--rows", "9", "--columns", "16"]) == 0
    assert capsys.readouterr().out.strip() == str(path)
    packed = zarr.open_array(path / "geopotential", mode="r")
    assert (packed.dtype, packed.chunks) == (np.int16, (1, 4, 16, 9))
    with xr.open_zarr(path, chunks=None) as stored:
        assert (stored.sizes["time"], stored["longitude"].values[0]) == (23, -180)
        assert bool(np.isfinite(stored["temperature"].values).all())
        heights = stored["geopotential"].mean(("time", "latitude", "longitude")).values
        assert (np.diff(heights) < 0).all()  # from 300 down to 850 hPa
    assert write_store([str(path)]) == 2
    assert "exists: choose another path" in capsys.readouterr().err
    assert [one.name for one in tmp_path.iterdir()] == ["small.zarr"]
