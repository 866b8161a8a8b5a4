"""``gates weather fit``: what a training run leaves, for every configuration and after kills."""

from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

from apps.weather.verbs import TRAIN_FORECAST
from benchmarks.weather.synthetic_store import write_synthetic_store

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "apps" / "weather" / "configs").glob("*.yaml"))
SEALED = ["osse", "outage", "mixed"]  # worlds whose networks come from another configuration
TRAININGS = [
    path
    for path in CONFIGS
    if "data" in yaml.safe_load(path.read_text()) and path.stem not in SEALED
]


def test_fit_leaves_a_run_and_weights(gates):
    folder = gates.folder / "runs/weather/unit"
    log = pd.read_csv(folder / "metrics.csv")
    assert log["step"].max() == 13
    assert {"train/loss", "val/score", "val/rmse_h"} <= set(log.columns)
    best = torch.load(folder / "checkpoints/best.ckpt", weights_only=True)["state_dict"]
    kept = load_file(folder / "weights/adas_increment-s0/weights.safetensors")
    name = next(n for n in kept if n.startswith("network.") and kept[n].ndim > 1)
    assert torch.equal(kept[name], best[f"analysis.{name}"].bfloat16())


@pytest.mark.parametrize("config", SEALED)
def test_a_world_that_takes_its_networks_trains_none(config, gates):
    assert "add --form adas_oi or ungated_oi, or take --config osse_shallow_water" in gates.refuse(
        "weather", "fit", "--config", config
    )


@pytest.mark.costly("networks at their real size")
@pytest.mark.parametrize("path", TRAININGS, ids=lambda path: path.stem)
def test_every_configuration_trains_a_step(path, gates):
    words = ["--name", f"step-{path.stem}", "--data.steps", 1, "--data.timelines", 1]
    words += ["--data.validation_steps", 1, "--data.validation_timelines", 1]
    words += ["--trainer.val_check_interval", 1, "--trainer.enable_model_summary", "false"]
    if "ReanalysisSource" in path.read_text():
        write_synthetic_store(gates.folder / "small/own.zarr", frames=40, rows=9, columns=16)
        words += ["--data.store", "small/own.zarr", "--data.background", "6h"]
    forecast = "NatureTrajectories" in path.read_text()
    if forecast or "TwinSource" in path.read_text():
        source = "--data.source.init_args"
        world = f"{source}.world.init_args"
        small = {"cycles": 6, "spin_up_days": 1, "num_tests": 1, "num_tuning": 1}
        small |= {"num_validation": 1, "num_training": 4, "path": f"small/{path.stem}.zarr"}
        for name, value in small.items():
            words += [f"{world}.{name}", value]
    if forecast:
        result = gates.weather(TRAIN_FORECAST, *words, config=path.stem)
        assert "nature run  " in result.out
        forecasts = gates.folder / f"runs/weather/step-{path.stem}/forecasts"
        assert (forecasts / "fengwu-s0" / "forecast.safetensors").is_file()
        return
    if "TwinSource" in path.read_text():
        words += [f"{source}.recording", f"small/{path.stem}.safetensors"]
        words += [f"{source}.block", 2]
    result = gates.weather("fit", *words, config=path.stem)
    if "TwinSource" in path.read_text():  # prepare was not called before
        assert "nature run  " in result.out
        assert "recording backgrounds  " in result.out
    weights = gates.folder / f"runs/weather/step-{path.stem}/weights"
    assert (weights / "adas_increment-s0" / "weights.safetensors").is_file()


@pytest.mark.slow
def test_killed_trainings_end_like_unbroken_ones(gates, kill_and_resume, monkeypatch):
    """Killed on recorded backgrounds (10 steps) and in its cycles (10 more)."""
    monkeypatch.chdir(gates.folder)
    command = ["weather", "fit", "--config", "unit"]
    command += ["--data.steps", "20", "--data.source.init_args.recorded_steps", "10"]
    command += ["--trainer.val_check_interval", "5", "--trainer.enable_model_summary", "false"]
    folder = kill_and_resume(command, app="weather", rows=[4, 15])
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["carried"].shape == (2, 3, 16, 32)
