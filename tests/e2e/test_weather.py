"""Every verb of ``gates weather`` on the unit configuration, from data to report."""

import hashlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
import yaml
from safetensors.torch import load_file

from apps.main import APPS
from apps.weather.commands import WeatherCLI, WeatherTrainer

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "apps" / "weather" / "configs").glob("*.yaml"))
NATURE = "runs/weather/unit/nature.zarr"


@pytest.fixture(scope="module")
def evaluated(gates):
    return gates.weather("evaluate", "--quick")


@pytest.fixture(scope="module")
def scores(gates, evaluated):
    return json.loads((gates.folder / "runs/weather/unit/scores.json").read_text())


def last_time(gates):
    with xr.open_zarr(gates.folder / NATURE) as nature:
        return nature["time"].values[-1]


def open_output(gates, name):
    return xr.open_zarr(gates.folder / name, consolidated=True)


def test_the_table_of_the_front_door_lists_the_verbs():
    assert tuple(APPS["weather"].verbs) == WeatherCLI.verbs


def test_prepare_leaves_what_exists(gates):
    recording = gates.folder / "runs/weather/unit/recording.safetensors"
    before = recording.stat().st_mtime_ns
    result = gates.weather("prepare")
    assert result.out.splitlines()[-1] == "runs/weather/unit/recording.safetensors"
    assert recording.stat().st_mtime_ns == before


def test_prepare_unpacks_the_era5_sample(gates):
    result = gates.weather("prepare", config="era5_ensemble")
    with open_output(gates, result.out.splitlines()[-1]) as sample:
        assert dict(sample.sizes) == {
            "time": 4,
            "number": 10,
            "level": 2,
            "latitude": 61,
            "longitude": 120,
        }
    observed = gates.weather("observe", "--output", "era5.csv", config="era5_ensemble")
    assert "2000 reports of 500 stations at 1 times" in observed.out
    assert set(pd.read_csv(gates.folder / "era5.csv")["variable"]) == {
        "geopotential",
        "temperature",
    }


def test_real_fields_are_assimilated(gates):
    """The background is the mean of the members twelve hours earlier; the truth is member 1."""
    store = gates.weather("prepare", config="era5_ensemble").out.splitlines()[-1]
    with open_output(gates, store) as sample:
        sample = sample.load()
    earlier = sample.isel(time=[2]).mean("number").assign_coords(time=sample["time"][[3]])
    earlier.to_netcdf(gates.folder / "earlier.nc", engine="h5netcdf")
    gates.weather("observe", "--output", "real.parquet", config="era5_ensemble")
    words = ["--background", "earlier.nc", "--observations", "real.parquet", "--method", "oi"]
    out = gates.weather("assimilate", *words, "--output", "real.zarr", config="era5_ensemble").out
    assert re.search(r"2017-01-02T12:00  \d+ cells observed, \d+ rejected", out)
    truth = sample.isel(time=[3], number=1)
    with open_output(gates, "real.zarr") as found:
        for name in ("geopotential", "temperature"):
            errors = [float(np.sqrt(((x - truth)[name] ** 2).mean())) for x in (earlier, found)]
            assert errors[1] < 0.9 * errors[0], name


def test_the_ensemble_tasks_are_scored_and_drawn(gates):
    words = ["--quick", "--seeds", "[99]", "--densities", "[0.01]", "--name", "real"]
    out = gates.weather("evaluate", *words, config="era5_ensemble").out
    assert out.splitlines()[-1] == "runs/weather/real/scores.json"
    scores = json.loads((gates.folder / "runs/weather/real/scores.json").read_text())
    assert {row["task"] for row in scores["rows"]} == {"persistence/0.01", "ensemble/0.01"}
    task = "persistence/0.01"
    assert figure(scores, "background", "ratio_z500", task) == 1
    assert figure(scores, "oi", "rmse_z500", task) < figure(scores, "background", "rmse_z500", task)
    assert figure(scores, "oi", "oa_rms_z500", task) < figure(scores, "oi", "ob_rms_z500", task)
    gates.weather("report", "--name", "real", config="era5_ensemble")
    page = (gates.folder / "runs/weather/real/report.html").read_text()
    assert "member 9 is the truth" in page
    assert "geopotential in m² s⁻²" in page


def test_observations_are_the_truth_with_errors(gates):
    table = pd.read_parquet(gates.folder / "observations.parquet")
    assert len(table) == 600
    winds = table[table["variable"] == "u_component_of_wind"]
    with xr.open_zarr(gates.folder / NATURE) as nature:
        field = nature["u_component_of_wind"].isel(time=-1, number=1)
        nearest = field.sel(
            latitude=xr.DataArray(winds["latitude"].values),
            longitude=xr.DataArray(winds["longitude"].values),
            method="nearest",
        ).values
    departure = winds["value"].to_numpy() - nearest
    # The nearest point is another one for a few reports, at 360 degrees and between rows.
    assert 0.7 < 1.4826 * np.median(np.abs(departure)) < 1.4


def test_fit_leaves_a_run_and_weights(gates):
    folder = gates.folder / "runs/weather/unit"
    log = pd.read_csv(folder / "metrics.csv")
    assert log["step"].max() == 13
    assert {"train/loss", "val/score", "val/rmse_h"} <= set(log.columns)
    best = torch.load(folder / "checkpoints/best.ckpt", weights_only=True)["state_dict"]
    kept = load_file(folder / "weights/adas_increment-s0/weights.safetensors")
    name = next(n for n in kept if n.startswith("network.") and kept[n].ndim > 1)
    assert torch.equal(kept[name], best[f"analysis.{name}"].bfloat16())


TUNED = ["--cycles", 6, "--densities", "[0.1]", "--trials", 1, "--trial_steps", 2]


def choices(gates, name):
    folder = gates.folder / "runs/weather" / name / "choices"
    return {p.parent.name: json.loads(p.read_text()) for p in folder.glob("*/result.json")}


def test_tune_keeps_a_choice_of_every_method(gates):
    result = gates.weather("tune", "--name", "tuned", *TUNED)
    found = choices(gates, "tuned")
    setting = found["letkf-task-0.1_error-s0"]["setting"]
    assert set(setting) == {"length_km", "excess", "relaxation"}
    assert {"adas_increment-s0", "adas_official-s0", "ungated-s0"} <= set(found)
    assert {len(choice["trials"]) for choice in found.values()} == {1}
    lines = result.out.splitlines()
    assert lines[-1] == "runs/weather/tuned/choices"
    assert any(line.startswith("oi@0.1/perfect  scale 0.") for line in lines)


def test_an_interrupted_tuning_goes_on(gates, monkeypatch):
    words = ["--name", "broken", *TUNED, "--only", "[oi, ungated]"]
    begun = []

    def interrupted(self, piece, *_, **__):
        begun.append(piece.name)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("apps.weather.networks.Training.fit", interrupted)
        assert gates("weather", "tune", "--config", "unit", *words).code == 130
    assert begun == ["ungated-trial0-s0"]
    before = choices(gates, "broken")
    assert set(before) == {"oi-task-0.1_error-s0", "oi-task-0.1_perfect-s0"}
    out = gates.weather("tune", *words).out
    assert "trials missing: 1 of 1, ungated-trial0-s0; making them now" in out
    assert "oi-task" not in out
    assert before.items() < choices(gates, "broken").items()


def test_evaluate_writes_scores_and_prints_their_path_last(gates, evaluated, scores):
    page = (ROOT / "docs" / "outputs.md").read_text()
    schema = json.loads(re.findall(r"^```json\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[0])
    jsonschema.validate(scores, schema)
    assert evaluated.out.splitlines()[-1] == "runs/weather/unit/scores.json"
    assert "weights missing: 2 of 3, adas_official-s0, ungated-s0; left out" in evaluated.out
    assert "of `fit`, with the optimizer of the configuration: adas_increment" in evaluated.out
    assert "never tuned: inverse_distance@0.1/perfect, " in evaluated.out
    assert scores["bars"] == []
    methods = {row["method"] for row in scores["rows"]}
    assert "adas_increment" in methods
    assert "ungated" not in methods
    assert {row["task"] for row in scores["rows"]} == {"0.1/perfect", "0.1/error"}
    text = (gates.folder / "runs/weather/unit/scores.md").read_text()
    assert text.startswith("# weather: unit\n\nrmse_h on 0.1/perfect: adas_increment ")
    assert "\n\n## 0.1/perfect\n\n| method | rmse_h |" in text
    assert scores["notes"] == text.split("\n\n")[2:4]
    assert scores["quick"]
    (data,) = scores["data"]
    assert data["name"] == "nature.zarr"


def test_persistence_and_the_signs_of_drifts_are_scored(scores):
    assert figure(scores, "persistence", "rmse_h") != figure(scores, "free_run", "rmse_h")
    assert figure(scores, "persistence", "lost") == 0
    tasks = ("0.1/perfect", "0.1/error")
    methods = {row["method"] for row in scores["rows"]}
    signed = {key: figure(scores, key[0], "drift_h_seed0", key[1])
              for key in ((method, task) for method in methods for task in tasks)}  # fmt: skip
    for (method, task), value in signed.items():
        assert abs(value) == figure(scores, method, "drift", task)
    assert min(signed.values()) < 0 < max(signed.values())


def figure(scores, method, metric, task="0.1/perfect"):
    (row,) = [
        row
        for row in scores["rows"]
        if (row["method"], row["metric"], row["task"]) == (method, metric, task)
    ]
    return row["value"]


def test_assimilation_helps_in_state_and_in_observation_space(scores):
    assert figure(scores, "letkf", "rmse_h") < 0.5 * figure(scores, "free_run", "rmse_h")
    for metric in ("ob_rms_h", "oa_rms_h", "withheld_rmse_h"):
        assert figure(scores, "letkf", metric) < figure(scores, "free_run", metric)
    assert figure(scores, "letkf", "oa_rms_h") < figure(scores, "letkf", "ob_rms_h")
    # What is withheld is farther from the analysis than what was assimilated.
    assert figure(scores, "letkf", "oa_rms_h") < figure(scores, "letkf", "withheld_rmse_h")
    assert figure(scores, "free_run", "ob_rms_h") == figure(scores, "free_run", "oa_rms_h")


def test_evaluate_makes_what_is_missing_and_nothing_twice(gates):
    words = ["--name", "whole", "--data.steps", 2, "--data.source.init_args.recorded_steps", 1]
    words += ["--data.validation_steps", 1, "--tuning.trial_steps", 2, "--tuning.cycles", 6]
    words += ["--trainer.val_check_interval", 1]
    result = gates.weather("evaluate", *words)
    assert "trials missing: 3 of 3, adas_increment-trial0-s0, " in result.out
    assert "weights missing: 3 of 3, adas_increment-s0, adas_" in result.out
    scores = json.loads((gates.folder / "runs/weather/whole/scores.json").read_text())
    assert {row["method"] for row in scores["rows"]} >= {"adas_official", "ungated", "oi"}
    assert len(scores["bars"]) == 9
    tasks = {row["task"] for row in scores["rows"]}
    assert tasks >= {
        "0.1/perfect/crossed",
        "0.1/perfect/redrawn",
        "0.1/error/redrawn",
        "0.1/perfect/corrupted",
    }
    redrawn = figure(scores, "oi", "rmse_h", "0.1/perfect/redrawn")
    assert redrawn != figure(scores, "oi", "rmse_h")
    metrics = ("declared_over_withheld", "denied_over_withheld")
    declared, denied = (figure(scores, "oi", m, "0.1/perfect/corrupted") for m in metrics)
    assert declared != denied
    again = gates.weather("evaluate", *words)
    assert "missing" not in again.out
    scores_again = json.loads((gates.folder / "runs/weather/whole/scores.json").read_text())
    assert scores_again["rows"] == scores["rows"]
    partly = gates.weather("evaluate", *words, "--only", "[oi]")
    assert "missing" not in partly.out
    some = json.loads((gates.folder / "runs/weather/whole/scores.json").read_text())
    assert {row["method"] for row in some["rows"]} == {"oi", "free_run"}
    assert some["bars"] == []
    for row in some["rows"]:
        assert row in scores["rows"]


KILLED = """
import os, signal, sys
from pathlib import Path
from harness.experiment import job
from weather.experiments.twin.scores import TwinScores
from weather.training.module import AdasModule
from apps.main import main

job.SAVED_EVERY = 0.0
place, number, *words = sys.argv[1:]
calls = 0

def dying(function, here):
    def call(*args, **kwargs):
        global calls
        if here == place:
            calls += 1
            if calls > int(number):
                os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

AdasModule.training_step = dying(AdasModule.training_step, "step")
TwinScores.compute = dying(TwinScores.compute, "cycles")
main(words)
"""


def test_an_evaluation_killed_between_and_inside_pieces_ends_with_the_same_bits(gates):
    words = ["--only", "[ungated, oi]", "--seeds", "[0]", "--data.steps", 8]
    words += ["--tuning.trial_steps", 2, "--tuning.cycles", 6]
    gates.weather("evaluate", *words, "--name", "unbroken")
    (gates.folder / "killed.py").write_text(KILLED)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    path = [str(ROOT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    for place, number in (("step", 7), ("cycles", 2)):  # 2 steps of the trial, 5 of the training
        command = [sys.executable, "killed.py", place, str(number), "weather", "evaluate"]
        command += ["--config", "unit", *map(str, words), "--name", "killed"]
        done = subprocess.run(command, cwd=gates.folder, env=environment, capture_output=True,
                              check=False)  # fmt: skip
        assert done.returncode == -9, done.stderr.decode()[-2000:]
    killed = gates.folder / "runs/weather/killed"
    assert len(list(killed.glob("cycles/[!.]*/record.json"))) == 2
    out = gates.weather("evaluate", *words, "--name", "killed").out
    assert "cycles missing: 4 of 6, " in out
    assert "weights" not in out
    whole = gates.folder / "runs/weather/unbroken"
    assert contents(whole) == contents(killed)
    assert len(contents(whole)) > 20


def contents(folder):
    """Results, and their records but for what differs from call to call."""
    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.name in ("record.json", "scores.json"):
            record = json.loads(path.read_text())
            for field in ("seconds", "revision", "command", "git"):
                record.pop(field, None)
            found[name] = record
        elif path.is_file() and path.suffix != ".md":  # which names the run
            found[name] = path.read_bytes()
    return found


def test_evaluate_scores_a_checkpoint_in_place_of_the_networks(gates):
    weights = "runs/weather/unit/weights/adas_increment-s0/weights.safetensors"
    words = ["--name", "pinned", "--quick", "--ckpt_path"]
    result = gates.weather("evaluate", *words, weights)
    assert "weights missing" not in result.out
    scores = json.loads((gates.folder / "runs/weather/pinned/scores.json").read_text())
    methods = {row["method"] for row in scores["rows"]}
    assert "adas_increment" in methods
    assert not methods & {"adas_official", "ungated"}
    assert scores["bars"] == []
    missing = gates("weather", "evaluate", "--config", "unit", *words, "nothing.ckpt")
    assert missing.code == 2
    assert "no checkpoint at nothing.ckpt" in missing.err.splitlines()[-1]


def test_report_is_one_page_without_network(gates, evaluated):
    result = gates.weather("report")
    path = result.out.splitlines()[-1]
    page = (gates.folder / path).read_text()
    assert path == "runs/weather/unit/report.html"
    assert page.count("data:image/png;base64,") >= 3
    assert not re.findall(r"(?:src|href)=[\"'](?!data:|#)", page)
    assert "letkf" in page
    assert ">Gates</h2>" in page
    assert "network.stages.0.conv" in page


def test_assimilate_writes_the_schema_of_weatherbench(gates):
    words = ["--background", NATURE, "--observations", "observations.parquet"]
    result = gates.weather("assimilate", *words, "--method", "oi", "--output", "all.zarr")
    assert result.out.splitlines()[-1] == "all.zarr"
    with open_output(gates, "all.zarr") as found, xr.open_zarr(gates.folder / NATURE) as nature:
        assert found["height"].dims == ("time", "latitude", "longitude")
        assert found["height"].dtype == np.float32
        assert found["height"].encoding["chunks"] == (1, 16, 32)
        assert np.array_equal(found["time"], nature["time"])
        truth = nature["height"].isel(number=1).values
        before = nature["height"].mean("number").values
        after = found["height"].values
        errors = [np.sqrt(np.mean((x[-1] - truth[-1]) ** 2)) for x in (before, after)]
        assert errors[1] < 0.8 * errors[0]  # the reports of the last time are of this member
        assert np.allclose(after[0], before[0])  # no report lies near the first time


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
    with open_output(gates, output) as found:
        return result.out, found.load()


@pytest.mark.parametrize(("poison", "message"), [(1e6, "1 of 600 reports"), (4000.0, "1 rejected")])
def test_poisoned_observations_are_rejected(gates, poison, message):
    """Beyond any plausible height, and plausible but far from the background."""
    name = f"poison-{poison:.0f}"
    clean_table = shifted_reports(gates, "clean.csv")
    table = pd.read_csv(gates.folder / clean_table).drop(index=5)
    table.to_csv(gates.folder / "without.csv", index=False)
    _, without = analysis(gates, "without.csv", f"{name}-without.zarr")
    poisoned = shifted_reports(gates, f"{name}.csv", poison=poison)
    out, found = analysis(gates, poisoned, f"{name}.zarr")
    assert message in out
    xr.testing.assert_equal(found, without)


@pytest.mark.fault("weather Bb")
@pytest.mark.parametrize("method", ["adas_increment", "oi"])
def test_times_without_reports_keep_their_background(gates, method):
    words = ["--background", NATURE, "--observations", "observations.parquet"]
    gates.weather("assimilate", *words, "--method", method, "--output", f"kept-{method}.zarr")
    with xr.open_zarr(gates.folder / NATURE) as nature:
        before = nature["height"].mean("number").values
    with open_output(gates, f"kept-{method}.zarr") as found:
        assert np.array_equal(found["height"].values[0], before[0])
        assert not np.array_equal(found["height"].values[-1], before[-1])


@pytest.mark.fault("weather B")
def test_an_output_says_what_it_is_made_of(gates):
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
    _, plain = analysis(gates, "said.csv", "plain.zarr")
    assert "weights_sha256" in plain.attrs
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
    with open_output(gates, "rolled.zarr") as found:
        times = found["time"].values
        fields = found["height"].values
    assert times[0] == last_time(gates)
    assert (np.diff(times) == np.timedelta64(6, "h")).all()
    # Nothing is observed after the first analysis: a free run from it.
    assert np.array_equal(fields[2], np.roll(fields[0], 12, -1))
    monkeypatch.syspath_prepend(gates.folder)
    gates.weather("assimilate", *words, "--forecast", "my_model.Roll", "--output", "path.zarr")
    sys.modules.pop("my_model")
    with open_output(gates, "path.zarr") as same:
        assert np.array_equal(same["height"].values, fields)


def test_the_second_analysis_starts_from_the_first(gates):
    now = shifted_reports(gates, "now.csv")  # all of the first analysis
    _, all_of_them = analysis(gates, now, "all_of_them.zarr", "--cycles", 2)
    pd.read_csv(gates.folder / now).head(3).to_csv(gates.folder / "three.csv", index=False)
    _, three = analysis(gates, "three.csv", "three.zarr", "--cycles", 2)
    difference = np.abs(all_of_them["height"].values - three["height"].values).max((1, 2))
    assert (difference > 0).all()


def test_assimilate_takes_a_checkpoint_and_needs_no_recording(gates):
    words = ["--background", NATURE, "--observations", "observations.parquet"]
    elsewhere = ["--data.source.init_args.recording", "absent.safetensors", "--name", "other"]
    best = "runs/weather/unit/checkpoints/best.ckpt"
    gates.weather(
        "assimilate", *words, *elsewhere, "--weights", best, "--output", "checkpoint.zarr"
    )
    gates.weather("assimilate", *words, "--output", "weights.zarr")
    with open_output(gates, "checkpoint.zarr") as a, open_output(gates, "weights.zarr") as b:
        # The kept weights are bfloat16.
        assert np.allclose(a["height"].values, b["height"].values, atol=1.0)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_trains_a_step(path, gates):
    words = ["--name", f"step-{path.stem}", "--data.steps", 1, "--data.timelines", 1]
    words += ["--data.validation_steps", 1, "--data.validation_timelines", 1]
    words += ["--trainer.val_check_interval", 1, "--trainer.enable_model_summary", "false"]
    if "TwinSource" in path.read_text():
        source = "--data.source.init_args"
        world = f"{source}.world.init_args"
        small = {"cycles": 6, "spin_up_days": 1, "num_tests": 1, "num_tuning": 1}
        small |= {"num_validation": 1, "num_training": 4, "path": f"small/{path.stem}.zarr"}
        for name, value in small.items():
            words += [f"{world}.{name}", value]
        words += [f"{source}.recording", f"small/{path.stem}.safetensors"]
        words += [f"{source}.block", 2]
    result = gates.weather("fit", *words, config=path.stem)
    if "TwinSource" in path.read_text():  # nobody called prepare before
        assert "nature run  " in result.out
        assert "recording backgrounds  " in result.out
    weights = gates.folder / f"runs/weather/step-{path.stem}/weights"
    assert (weights / "adas_increment-s0" / "weights.safetensors").is_file()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_sections_of_verbs_hold_their_options(path):
    content = yaml.safe_load(path.read_text())
    for verb in set(content) & set(WeatherCLI.verbs):
        assert set(content[verb]) <= set(
            inspect.signature(getattr(WeatherTrainer, verb)).parameters
        )


def test_killed_trainings_end_like_unbroken_ones(gates, kill_and_resume, monkeypatch):
    """Killed on recorded backgrounds (30 steps) and in its cycles (30 more)."""
    monkeypatch.chdir(gates.folder)
    command = [sys.executable, "-m", "apps.main", "weather", "fit", "--config", "unit"]
    command += ["--data.steps", "60", "--data.source.init_args.recorded_steps", "30"]
    command += ["--trainer.val_check_interval", "20", "--trainer.enable_model_summary", "false"]
    folder = kill_and_resume(command, app="weather", rows=[12, 44])
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["carried"].shape == (2, 3, 16, 32)
