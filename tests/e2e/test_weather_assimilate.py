"""``gates weather assimilate``: a user's background, reports, weights and forecast model."""

import hashlib
import json
import sys

import numpy as np
import pandas as pd
import pytest
import xarray as xr

NATURE = "runs/weather/unit/nature.zarr"


def last_time(gates):
    with xr.open_zarr(gates.folder / NATURE) as nature:
        return nature["time"].values[-1]


def test_assimilate_writes_the_schema_of_weatherbench(gates):
    words = ["--background", NATURE, "--observations", "observations.parquet"]
    result = gates.weather("assimilate", *words, "--method", "oi", "--output", "all.zarr")
    assert result.out.splitlines()[-1] == "all.zarr"
    with gates.opened("all.zarr") as found, xr.open_zarr(gates.folder / NATURE) as nature:
        assert found["height"].dims == ("time", "latitude", "longitude")
        assert found["height"].dtype == np.float32
        assert found["height"].encoding["chunks"] == (1, 16, 32)
        assert np.array_equal(found["time"], nature["time"])
        truth = nature["height"].isel(number=1).values
        before = nature["height"].mean("number").values
        after = found["height"].values
        errors = [np.sqrt(np.mean((x[-1] - truth[-1]) ** 2)) for x in (before, after)]
        assert errors[1] < 0.8 * errors[0]  # the reports of the last time are of this member
        assert np.array_equal(after[0], before[0])  # no report lies near the first time


def shifted_reports(gates, name, *, hours=0.0, poison=None):
    """A user's own table: CSV with the columns that are needed, and nothing else."""
    table = pd.read_parquet(gates.folder / "observations.parquet")
    table["time"] += pd.Timedelta(hours=hours)
    if poison is not None:
        table.loc[table.index[5], "value"] = poison
    needed = ["time", "latitude", "longitude", "variable", "value", "error"]
    table[needed].to_csv(gates.folder / name, index=False)
    return name


def analysis(gates, observations, output, *words):
    options = ["--background", NATURE, "--method", "adas_increment", "--forecast", "model"]
    result = gates.weather(
        "assimilate", *options, "--observations", observations, "--output", output, *words
    )
    with gates.opened(output) as found:
        return result.out, found.load()


@pytest.fixture(scope="module")
def plain(gates):
    """Of all reports, with every option as it is."""
    return analysis(gates, shifted_reports(gates, "plain.csv"), "plain.zarr")[1]


@pytest.mark.parametrize(("poison", "message"), [(1e6, "1 of 600 reports"), (4000.0, "1 rejected")])
def test_poisoned_observations_are_rejected(gates, poison, message):
    """Beyond any plausible height, and plausible but far from the background."""
    name = f"poison-{poison:.0f}"
    table = pd.read_csv(gates.folder / shifted_reports(gates, "clean.csv")).drop(index=5)
    table.to_csv(gates.folder / "without.csv", index=False)
    _, without = analysis(gates, "without.csv", f"{name}-without.zarr")
    poisoned = shifted_reports(gates, f"{name}.csv", poison=poison)
    out, found = analysis(gates, poisoned, f"{name}.zarr")
    assert message in out
    xr.testing.assert_equal(found, without)


@pytest.mark.fault("weather Ba")
@pytest.mark.parametrize(
    ("factor", "said"),
    [(9.80665, "every report of height is out of range"), (1.6, "observed cells of h:")],
)
def test_reports_that_are_all_in_another_unit_are_refused(gates, factor, said):
    """Geopotential for height, and what no limit of heights shows."""
    table = pd.read_csv(gates.folder / shifted_reports(gates, "si.csv"))
    table["value"] *= factor
    table.to_csv(gates.folder / "other.csv", index=False)
    words = ["--background", NATURE, "--observations", "other.csv", "--method", "oi"]
    assert said in gates.refuse(
        "weather", "assimilate", "--config", "unit", *words, "--output", "o.zarr"
    )
    assert not (gates.folder / "o.zarr").exists()


@pytest.mark.fault("weather B")
def test_an_output_says_what_it_is_made_of(gates, plain):
    options = ["--representativeness", '{"height": 5.0}', "--background_error", '{"height": 50.0}']
    _, found = analysis(gates, shifted_reports(gates, "said.csv"), "said.zarr", *options)
    facts = found.attrs
    assert facts["Conventions"].startswith("CF-1.")
    assert (facts["method"], facts["task"]) == ("adas_increment", "0.1/perfect")
    assert facts["configuration"] == "unit"
    weights = gates.folder / "runs/weather/unit/weights/adas_increment-s0/weights.safetensors"
    assert facts["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert facts["observed_cells"][0] > 100
    assert facts["rejected_cells"] == [0]
    assert json.loads(facts["background_error"]) == {"height": 50.0}
    assert json.loads(facts["representativeness"]) == {"height": 5.0}
    assert found["u_component_of_wind"].attrs["standard_name"] == "eastward_wind"
    assert "weights_sha256" in plain.attrs
    assert not np.array_equal(plain["height"], found["height"])


def test_the_observation_operator_is_chosen(gates, plain):
    words = ("interpolated.zarr", "--observation_operator", "interpolation")
    _, found = analysis(gates, "plain.csv", *words)
    assert plain.attrs["observation_operator"] == "nearest_cell"
    assert found.attrs["observation_operator"] == "interpolation"
    assert found.attrs["observed_cells"] == plain.attrs["observed_cells"]
    assert not np.array_equal(plain["height"], found["height"])


MODEL = """
import torch

class Roll(torch.nn.Module):
    def forward(self, states, hours):
        return states.roll(int(hours), -1)
"""


def test_a_cycle_with_a_forecast_model_of_the_user(gates, monkeypatch):
    (gates.folder / "my_model.py").write_text(MODEL)
    table = pd.read_parquet(gates.folder / "observations.parquet")
    late = table.assign(time=table["time"] + pd.Timedelta(hours=240))
    pd.concat((table, late)).to_csv(gates.folder / "late.csv", index=False)
    words = ["--background", NATURE, "--observations", "late.csv", "--method", "oi", "--cycles", 3]
    result = gates.weather(
        "assimilate", *words, "--forecast", "my_model.py:Roll", "--output", "rolled.zarr"
    )
    assert "600 of 1200 reports are left out: 600 not within 3 h of an analysis (" in result.out
    with gates.opened("rolled.zarr") as found:
        times = found["time"].values
        fields = found["height"].values
    assert times[0] == last_time(gates)
    assert (np.diff(times) == np.timedelta64(6, "h")).all()
    # Nothing is observed after the first analysis: a free run from it.
    assert np.array_equal(fields[2], np.roll(fields[0], 12, -1))
    monkeypatch.syspath_prepend(gates.folder)
    gates.weather("assimilate", *words, "--forecast", "my_model.Roll", "--output", "path.zarr")
    sys.modules.pop("my_model")
    with gates.opened("path.zarr") as same:
        assert np.array_equal(same["height"].values, fields)


@pytest.mark.fault("weather Bb")
def test_assimilate_takes_a_checkpoint_and_needs_no_recording(gates):
    words = ["--background", NATURE, "--observations", "observations.parquet"]
    words += ["--method", "adas_increment"]
    elsewhere = ["--data.source.init_args.recording", "absent.safetensors", "--name", "other"]
    best = "runs/weather/unit/checkpoints/best.ckpt"
    gates.weather(
        "assimilate", *words, *elsewhere, "--weights", best, "--output", "checkpoint.zarr"
    )
    gates.weather("assimilate", *words, "--output", "weights.zarr")
    with gates.opened("checkpoint.zarr") as a, gates.opened("weights.zarr") as b:
        # The kept weights are bfloat16.
        assert np.allclose(a["height"].values, b["height"].values, atol=1.0)
        with xr.open_zarr(gates.folder / NATURE) as nature:  # no report lies near the first time
            assert np.array_equal(b["height"][0], nature["height"][0].mean("number"))
