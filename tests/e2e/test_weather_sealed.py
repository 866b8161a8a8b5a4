"""``gates weather`` in a sealed world: tuned, scored with the network of `unit`, reported."""

import csv
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import yaml

from weather.experiments.osse.rivals import turn_of

CONFIGS = Path(__file__).parents[2] / "apps" / "weather" / "configs"
METHODS = "[adas_oi]"


@pytest.fixture(scope="module")
def sealed(gates):
    """A run folder with the scores of a week with the network of `unit`."""
    content = yaml.safe_load((CONFIGS / "unit.yaml").read_text())
    world = content["data"]["source"]["init_args"]["world"]
    world["class_path"] = "weather.experiments.osse.sealed_world.OsseWorld"
    imperfect = world["init_args"]["model"]["init_args"] | {"stirring": 4.9e-10}
    world["init_args"] |= {"path": "runs/weather/sealed/nature.zarr", "cycles": 30}
    world["init_args"]["imperfect"] = world["init_args"]["model"] | {"init_args": imperfect}
    content["data"]["source"] = {
        "class_path": "weather.experiments.osse.osse_experiment.OsseExperiment",
        "init_args": {
            "world": world,
            "folder": "runs/weather/sealed",
            "networks": "runs/weather/unit",
            "densities": [0.1],
            "num_sealed": 4,
        },
    }
    content["data"] |= {"steps": 1, "timelines": 1}
    content["trainer"] |= {"limit_val_batches": 0, "val_check_interval": 1.0}
    budget = {"trials": 1, "densities": [0.1], "cycles": 6}
    content |= {"tune": budget, "evaluate": {"densities": [0.1], "seeds": [0], "tuning": budget}}
    (gates.folder / "sealed.yaml").write_text(yaml.safe_dump(content))
    gates.weather("evaluate", "--only", METHODS, config="sealed.yaml")
    return gates.folder / "runs/weather/sealed"


@pytest.mark.slow
def test_what_builds_on_interpolation_is_tuned_after_it(sealed):
    found = {path.parent.name for path in sealed.glob("choices/*/result.json")}
    assert {"oi-task-0.1_perfect-s0", "adas_oi-task-0.1_error-s0"} <= found
    oi = json.loads((sealed / "choices/oi-task-0.1_perfect-s0/result.json").read_text())
    for name in ("adas_oi", "damped_oi"):
        record = json.loads(
            (sealed / f"choices/{name}-task-0.1_perfect-s0/record.json").read_text()
        )
        assert record["settings"]["interpolation"] == oi["setting"]
    damped = json.loads((sealed / "choices/damped_oi-task-0.1_perfect-s0/result.json").read_text())
    first = {name: damped["trials"][0][name] for name in ("relative_scale", "turn", "alpha")}
    assert first == {"relative_scale": 1.0, "turn": turn_of(oi["setting"]), "alpha": 1.0}
    assert len(damped["trials"]) == 2
    assert len(oi["trials"]) == 2  # three settings, twice the trials
    assert set(json.loads((sealed / "choices/adas_oi-task-0.1_perfect-s0/result.json").read_text())[
        "setting"]) == {"alpha", "beta"}  # fmt: skip


def test_results_are_named_by_the_sealed_world_and_the_network(sealed):
    (world,) = sealed.glob("sealed-*.zarr")
    seed = world.stem.partition("-")[2]
    names = [path.name for path in sealed.glob("cycles/*")]
    assert names
    assert all(f"world-{seed}" in name for name in names)
    assert all(("weights-" in name) == name.startswith("adas_oi") for name in names)


def test_missing_networks_survive_in_the_report(gates, sealed):
    scores = json.loads((sealed / "scores.json").read_text())
    notes = {row["method"]: row["note"] for row in scores["rows"] if "note" in row}
    assert set(notes) == {"ungated_oi", "ungated"}
    assert "--model.network.gated false`" in notes["ungated"]
    rows = {(row["method"], row["task"], row["metric"]): row for row in scores["rows"]}
    assert rows["adas_oi", "0.1/perfect", "over_oi"]["n"] == 4
    assert scores["headline"].startswith(
        "On 4 sealed timelines with 10 % of the points and a perfect model the corrected analysis "
    )
    gates.weather("report", config="sealed.yaml")
    with (sealed / "figures/error-over-cost.csv").open() as file:
        drawn = {row["series"]: row for row in csv.DictReader(file) if row["kind"] == "point"}
    assert set(drawn) == {"damped_oi", "oi", "adas_oi"}
    for axis, metric in (("x", "milliseconds_over_oi"), ("y", "over_damped_oi")):
        value = rows["adas_oi", "0.1/perfect", metric]["value"]
        assert float(drawn["adas_oi"][axis]) == pytest.approx(value, rel=1e-3)
    assert "ungated_oi: not trained: run <code>gates weather fit" in (
        sealed / "report.html").read_text()  # fmt: skip


@pytest.fixture(scope="module")
def corrected(gates, sealed):
    """What two training runs of four steps print and leave: from a network, and a fresh one."""
    found, weights = {}, gates.folder / "start/weights.safetensors"
    shutil.copytree(gates.folder / "runs/weather/unit/weights/adas_increment-s0", weights.parent)
    record = json.loads((weights.parent / "record.json").read_text())
    record["objects"].append("seen by the start alone")
    (weights.parent / "record.json").write_text(json.dumps(record))
    for form, start in (("adas_oi", ("--start", weights)), ("ungated_oi", ())):
        words = ("--form", form, *start, "--name", f"trained-{form}", "--data.timelines", "2")
        few = ("--data.steps", "4", "--model.warmup", "0.5")
        printed = gates.weather("fit", *words, *few, config="sealed.yaml").out
        found[form] = printed, gates.folder / f"runs/weather/trained-{form}/weights/{form}-s0"
    return found


def test_a_correction_is_trained_in_its_cycle_and_compared_with_its_start(gates, corrected):
    printed, folder = corrected["adas_oi"]
    assert "adas_oi over its start in " in printed
    record = json.loads((folder / "record.json").read_text())
    ratio, low, high = record["facts"]["over_start"]
    assert low <= ratio <= high
    (start,) = gates.folder.glob("runs/weather/unit/weights/adas_increment-s0/*.safetensors")
    assert record["settings"]["start"] == hashlib.sha256(start.read_bytes()).hexdigest()[:16]
    assert start.read_bytes() != (folder / "weights.safetensors").read_bytes()
    assert "seen by the start alone" in record["objects"]
    assert record["settings"]["model.network.init_args.drop_path"] == 0.0


def test_a_fresh_correction_starts_from_interpolation(corrected):
    printed, folder = corrected["ungated_oi"]
    assert "ungated_oi over interpolation in " in printed
    assert "start" not in json.loads((folder / "record.json").read_text())["settings"]


@pytest.mark.slow
def test_a_trained_correction_takes_the_place_of_its_start(gates, sealed, corrected):
    place = corrected["adas_oi"][1].parents[1].relative_to(gates.folder)
    one = ("--data.source.init_args.corrections", place)
    gates.weather("evaluate", "--only", METHODS, *one, "--name", "other", "--seeds", "[0, 1]",
                  "--quick", config="sealed.yaml")  # fmt: skip
    names = [path.name for path in (gates.folder / "runs/weather/other/cycles").glob("adas_oi-*")]
    before = [path.name for path in sealed.glob("cycles/adas_oi-*")]
    assert names
    assert {n.partition("weights-")[2] for n in names}.isdisjoint(
        n.partition("weights-")[2] for n in before)  # fmt: skip
    scores = json.loads((gates.folder / "runs/weather/other/scores.json").read_text())
    notes = {row["method"]: row["note"] for row in scores["rows"] if "note" in row}
    assert "--form adas_oi --start networks --seed_everything 1`" in notes["adas_oi"]


def test_what_cannot_be_asked_of_it_is_one_line(gates, sealed):
    (whole,) = gates.folder.glob("runs/weather/unit/weights/adas_increment-s0/*.safetensors")
    cut = gates.folder / "cut"
    cut.mkdir()
    (cut / "record.json").write_bytes((whole.parent / "record.json").read_bytes())
    (cut / "weights.safetensors").write_bytes(whole.read_bytes()[:2000])
    (gates.folder / "lone.safetensors").write_bytes(whole.read_bytes())
    for words in (
        ("fit",),
        ("fit", "--form", "adas_oi", "--name", "y", "--start", "lone.safetensors"),
        ("fit", "--form", "ungated_oi", "--name", "y", "--start", whole),
        ("fit", "--form", "ungated_oi", "--name", "y", "--start", "networks"),
        ("fit", "--form", "adas_oi", "--name", "y", "--ckpt_path", "nothing.ckpt"),
        ("fit", "--form", "adas_oi", "--name", "y", "--start", "nothing.safetensors"),
        ("fit", "--form", "adas_oi", "--name", "y", "--start", "cut/weights.safetensors"),
        ("fit", "--name", "y", "--start", "networks"),
    ):
        gates.refuse("weather", words[0], "--config", "sealed.yaml", *words[1:])
    assert not (gates.folder / "runs/weather/y").exists()


@pytest.mark.parametrize("words", [
    ("--train", "true"), ("--densities", "[0.05]"), ("--densities", "[0.1004]"),
    ("--ckpt_path", "nothing.ckpt"),
])  # fmt: skip
def test_an_evaluation_that_cannot_be_is_one_line(words, gates, sealed):
    gates.refuse("weather", "evaluate", "--config", "sealed.yaml", "--name", "x", *words)


@pytest.fixture(scope="module")
def reported(gates, sealed):
    """What `assimilate` and `cycle` are given: a background, and reports of its last time."""
    gates.weather("observe", "--stations", 30, "--output", "r.parquet", config="sealed.yaml")
    truth = sealed.relative_to(gates.folder) / "nature.zarr"
    return "--observations", "r.parquet", "--background", truth


@pytest.mark.fault("46 W1")
@pytest.mark.parametrize("method", ["oi", "adas_increment", "adas_oi", "damped_oi"])
def test_a_table_is_assimilated_by_every_method_that_is_scored(gates, sealed, reported, method):
    words = (*reported, "--method", method, "--output", f"{method}.zarr")
    found = gates.weather("assimilate", *words, config="sealed.yaml")
    assert found.out.splitlines()[-1] == f"{method}.zarr"
    assert "never tuned" not in found.out
    with xr.open_zarr(gates.folder / f"{method}.zarr") as store:
        analysis, said = store["height"].values[-1], store.attrs
    with xr.open_zarr(gates.folder / reported[-1]) as store:
        assert not np.allclose(analysis, store["height"][-1].mean("number"))
    assert ("weights_sha256" in said) == method.startswith("adas")
    if method in ("adas_oi", "damped_oi"):
        chosen = sealed / f"choices/{method}-task-0.1_perfect-s0/result.json"
        assert json.loads(said["settings"]) == json.loads(chosen.read_text())["setting"]


@pytest.mark.fault("46 W1")
@pytest.mark.parametrize("method", ["adas_oi", "damped_oi"])
def test_what_corrects_interpolation_cycles(gates, reported, method):
    words = (*reported, "--method", method, "--output", f"cycle-{method}")
    found = gates.weather("cycle", *words, "--cycles", 1, config="sealed.yaml")
    assert found.out.splitlines()[-1] == f"cycle-{method}"
    heights = []
    for name in ("analyses", "backgrounds"):
        with xr.open_zarr(gates.folder / f"cycle-{method}/{name}.zarr") as store:
            heights.append(store["height"].values[-1])
            assert store.attrs["method"] == method
    assert not np.array_equal(*heights)
