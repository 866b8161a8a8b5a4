"""Faulty calls of ``gates weather``: one line, exit code 2, and no run is lost or half written."""

import json
import shutil

import pytest
import torch

NATURE = "runs/weather/unit/nature.zarr"
WEIGHTS = "runs/weather/unit/weights/adas_increment-s0/weights.safetensors"


@pytest.fixture(scope="module")
def folder(gates):
    """Damaged files and runs next to the prepared run."""
    here = gates.folder
    _runs(here)
    torch.save({"weight": torch.ones(1)}, here / "plain.ckpt")
    (here / "typo.yaml").write_text("model: {learning_rat: 0.1}\n")
    (here / "three.yaml").write_text("model: 3\n")
    return here


def _runs(here):
    for name in ("damaged", "unscored", "unwritten", "negative", "half", "full"):
        (here / "runs/weather" / name).mkdir(parents=True)
    (here / "runs/weather/damaged/scores.json").write_text('{"rows": [')
    (here / "runs/weather/damaged/recording.safetensors").write_bytes(b"\0" * 64)
    row = {"method": "oi", "task": "a", "metric": "m", "value": 1.0, "low": None, "high": None}
    row |= {"n": 1, "versus": None, "p": None}
    empty = {"app": "weather", "rows": [], "bars": [], "seeds": [], "data": [], "notes": []}
    empty |= {"headline": "", "quick": False}
    (here / "runs/weather/half/scores.json").write_text(json.dumps(empty))
    (here / "runs/weather/half/cycles.safetensors").write_bytes(b"\0" * 64)
    bar = {"name": "a", "value": 1.0, "sense": "<=", "bar": 1.0, "unit": "", "met": True}
    (here / "runs/weather/full/scores.json").write_text(
        json.dumps(empty | {"rows": [row], "bars": [bar]})
    )
    shutil.copytree(here / NATURE, here / "damaged.zarr")
    next((here / "damaged.zarr/height").glob("1.*")).write_bytes(b"nothing like a chunk")


SOURCE = "--data.source.init_args"
FAULTS = {
    "misspelled verb": (("asimilate",), "did you mean assimilate"),
    "misspelled option": (
        ("fit", "--data.stepz", "3"),
        "unrecognized arguments: --data.stepz 3 (did you mean --data.steps?)",
    ),
    "wrong key in a configuration": (
        ("fit", "--config", "typo.yaml"),
        "unknown key 'model.learning_rat' in typo.yaml (did you mean model.learning_rate?)",
    ),
    "missing configuration": (
        ("fit", "--config", "unti"),
        "configuration 'unti' found neither in .* era5_ensemble, .*unit",
    ),
    "value of a wrong type": (
        ("fit", "--data.steps", "many"),
        "data.steps: expected int, found 'many'",
    ),
    "number out of range": (
        ("fit", "--name", "new", "--data.steps", "0"),
        "steps must be at least 1, got 0",
    ),
    "class path of no module": (
        ("fit", "--data.source", "no.such.Source"),
        "no.such.Source",
    ),
    "unusable data, found out when they are set up": (
        ("fit", "--name", "new", f"{SOURCE}.block", "30"),
        "recording.safetensors holds no background that did not lose the truth and has 30 cycles",
    ),
    "existing run": (("fit",), "run folder runs/weather/unit exists: add --resume"),
    "resume and overwrite": (("fit", "--resume", "--overwrite"), "exclude each other"),
    "nature run of another world": (
        ("prepare", f"{SOURCE}.world.init_args.seed", "5"),
        r"nature.zarr holds another run .*seed 0 instead of 5\): remove it or name another path",
    ),
    "errors of too few channels": (
        ("prepare", f"{SOURCE}.world.init_args.error_sd", "[1.0]"),
        "error_sd has 1 values, expected 3, one each for h, u, v",
    ),
    "error of an unknown variable": (
        ("prepare", f"{SOURCE}.world.init_args.error_sd", '{"hight": 10.0}'),
        "error_sd names hight, expected each of height, u_component_of_wind, v_component_of_wind",
    ),
    "damaged recording": (
        (
            "fit",
            "--name",
            "new",
            f"{SOURCE}.recording",
            "runs/weather/damaged/recording.safetensors",
        ),
        "recording.safetensors is not a readable recording .*: delete it and run",
    ),
    "recording of another world": (
        ("fit", "--name", "new", f"{SOURCE}.scales", "[0.2]"),
        "was recorded in another world .*scales .* instead of .*: delete it and run",
    ),
    "training from a file of tensors": (
        ("fit", "--name", "new", "--ckpt_path", "plain.ckpt"),
        "plain.ckpt is not a checkpoint of a training( run)?: give checkpoints/last.ckpt",
    ),
    "training from weights": (
        ("fit", "--name", "new", "--ckpt_path", WEIGHTS),
        "weights.safetensors is not a checkpoint of a training( run)?: give",
    ),
    "evaluation of a file of tensors": (
        ("evaluate", "--name", "new", "--ckpt_path", "plain.ckpt"),
        "plain.ckpt is not a checkpoint of a training( run)?: give",
    ),
    "model that is a number": (
        ("fit", "--config", "three.yaml"),
        "three.yaml: model is 3, expected a mapping 'key: value'",
    ),
    "network of another grid": (
        ("fit", "--name", "new", "--model.network.grid_shape", "[16, 16]"),
        r"model.network.grid_shape is .*16, 16.*, the data has \(16, 32\): set it to that",
    ),
    "network of other channels": (
        ("fit", "--name", "new", "--model.network.num_surface", "4"),
        "model.network.num_surface is 4, the data has 3: set it to that",
    ),
    "density out of range": (
        ("evaluate", "--densities", "[2.0]"),
        "--densities [2.0] cannot be used: give one or more fractions",
    ),
    "seed out of range": (("evaluate", "--seeds", "[-1]"), "--seeds [-1] cannot be used: give"),
    "tuning without trials": (
        ("tune", "--trials", "0"),
        "--trials must be at least 1, found 0",
    ),
    "tuning longer than the world": (
        ("tune", "--cycles", "10000"),
        "--cycles 10000 is more than the 24 cycles of the world: take fewer",
    ),
    "nature run with a damaged chunk": (
        ("evaluate", "--name", "new", "--quick", f"{SOURCE}.world.init_args.path", "damaged.zarr"),
        "damaged.zarr: height cannot be read: .* or delete it and run `gates weather prepare`",
    ),
    "quick run over a full evaluation": (
        ("evaluate", "--name", "full", "--quick"),
        "full/scores.json holds a full evaluation, which a quick run would replace: add --name",
    ),
    "checkpoint at a full evaluation": (
        ("evaluate", "--name", "full", "--ckpt_path", WEIGHTS),
        "full/scores.json holds a full evaluation, which a quick run would replace: add --name",
    ),
    "network of other settings": (
        ("evaluate", "--name", "unit", "--quick", "--data.steps", "15"),
        r"adas_increment-s0 was made with other settings \(data.steps 14, now 15\): give those",
    ),
    "method that takes part and is none": (
        ("evaluate", "--only", "[kalman]"),
        "--only kalman is unknown: choose from adas_increment, ",
    ),
    "resumed with another seed": (
        ("fit", "--resume", "--seed_everything", "1"),
        "was trained with other settings (seed_everything null, now 1): resume it with those",
    ),
    "resumed with another seed of the data": (
        ("fit", "--resume", f"{SOURCE}.seed", "1"),
        "was trained with other settings (seed_everything null, now 0; seed 0, now 1): resume",
    ),
    "resumed with another learning rate": (
        ("fit", "--resume", "--model.learning_rate", "0.5"),
        "was trained with other settings (model.learning_rate 0.003, now 0.5): resume it with",
    ),
    "resumed with another batch": (
        ("fit", "--resume", "--data.timelines", "4"),
        "was trained with other settings (data.timelines 2, now 4): resume it with those",
    ),
    "resumed in another world": (
        ("fit", "--resume", f"{SOURCE}.world.init_args.num_training", "6"),
        "was trained with other settings (data.source.init_args.world.init_args.num_training 4, "
        "now 6): resume it with those",
    ),
    "resumed for less time": (
        ("fit", "--resume", "--trainer.max_epochs", "0"),
        "--trainer.max_epochs 0 trains nothing: give a larger one",
    ),
    "member that does not exist": (
        ("observe", "--member", "99", "--output", "new.csv"),
        "--member 99 does not exist: the store has members 0 to 7",
    ),
    "time that does not exist": (
        ("observe", "--time", "200", "--output", "new.csv"),
        "the store has 28 times, 1 from index 200 do not fit: choose --time from -28 to 27",
    ),
    "table of another format": (
        ("observe", "--output", "new.txt"),
        "new.txt ends in '.txt', expected .parquet or .csv: rename or convert it",
    ),
    "existing table": (("observe",), "observations.parquet exists: choose another --output"),
    "store that is missing": (
        ("observe", "--config", "era5_ensemble", "--name", "unwritten", "--output", "new.csv"),
        "unwritten/era5_ensemble.zarr does not exist: run `gates weather prepare`, or give --truth",
    ),
    "report without scores": (
        ("report", "--name", "unscored"),
        "unscored/scores.json does not exist: run `gates weather evaluate` first",
    ),
    "damaged cycles": (
        ("report", "--name", "half"),
        "half/cycles.safetensors is damaged .*: run `gates weather evaluate` again",
    ),
    "damaged scores": (
        ("report", "--name", "damaged"),
        "damaged/scores.json is damaged .*: run `gates weather evaluate` again",
    ),
}


CLAIMS = "unusable data, found out when they are set up"
MARKED = {CLAIMS: pytest.param(CLAIMS, marks=pytest.mark.fault("endoscopy D17"))}


@pytest.mark.parametrize("fault", [MARKED.get(fault, fault) for fault in FAULTS])
def test_a_faulty_call_is_one_line(fault, gates, folder, faulty_inputs):
    words, expected = FAULTS[fault]
    config = () if "--config" in words or fault == "misspelled verb" else ("--config", "unit")
    command = ("weather", words[0], *config, *words[1:])
    faulty_inputs({fault: (command, expected)}, run=gates, folder=folder)


@pytest.mark.fault("weather Bd")
@pytest.mark.parametrize("verb", ["fit", "evaluate"])
def test_a_call_without_configuration_is_told_their_names(gates, verb):
    start = f"gates weather {verb}: error: no configuration is named: give --config NAME: one of "
    assert gates.refuse("weather", verb).startswith(f"{start}era5_ensemble, ")
