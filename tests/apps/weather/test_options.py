"""What ``gates weather`` refuses before it begins: options, settings, checkpoints, places."""

import dataclasses
import inspect
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from apps.weather.commands import WeatherTrainer
from apps.weather.networks import load_trained
from apps.weather.scoring import Budget, check_densities, check_only, check_seeds, check_tuning
from harness.files.atomic import require_free
from weather.assimilation import ObservedBy
from weather.baselines.covariance import HomogeneousCovariance
from weather.experiments.experiment import Method, built, experiment_of, load_pictures
from weather.experiments.twin.source import TwinSource
from weather.grid import regular_grid
from weather.operations.analyses import AnalysisOptions

WORLD = SimpleNamespace(cycles=24, members={"test": range(2)})


@pytest.fixture
def source():
    """A twin source that knows its world and nothing else."""
    made = object.__new__(TwinSource)
    made.world = WORLD
    return made


def test_verbs_that_analyze_have_the_options_of_every_analysis():
    shared = dataclasses.fields(AnalysisOptions)
    required = {"assimilate": {"observations"}, "cycle": {"observations", "background"}}
    for verb, needed in required.items():
        options = inspect.signature(getattr(WeatherTrainer, verb)).parameters
        assert {f.name for f in shared if options[f.name].default is inspect.Parameter.empty} == (
            needed
        )
        other = {
            field.name: options[field.name].default
            for field in shared
            if field.name not in needed and options[field.name].default != field.default
        }
        assert other == ({"forecast": "model"} if verb == "cycle" else {})
        kinds = {f.name: options[f.name].annotation for f in shared}
        assert kinds["observation_operator"] == ObservedBy


def test_densities_are_shares_of_grid_points(refused):
    check_densities((0.1, 0.01, 1.0))
    for wrong in ((), (2.0,), (-1.0,), (0.0,), (0.1, math.nan), (0.1, 0.1), (0.1234,)):
        refused(r"--densities \[.*\] cannot be used: give one or", check_densities, wrong)


def test_seeds_are_numbers_that_a_generator_takes(refused):
    check_seeds((0, 2**32 - 1))
    for wrong in ((), (-1,), (2**32,), (1, 1)):
        refused(r"--seeds \[.*\] cannot be used: give one or more", check_seeds, wrong)


@pytest.mark.parametrize("name", ["trials", "cycles", "trial_steps"])
def test_a_budget_of_tuning_is_not_nothing(source, name, refused):
    budget = {"trials": 1, "cycles": 24, "trial_steps": 1}
    check_tuning(source, Budget(**budget))
    for wrong in (0, -3):
        refused(
            f"--{name} must be at least 1, found {wrong}",
            check_tuning,
            source,
            Budget(**budget | {name: wrong}),
        )
    refused(
        "--cycles 25 is more than the 24 cycles of the world",
        check_tuning,
        source,
        Budget(1, cycles=25, trial_steps=1),
    )
    free = SimpleNamespace(max_cycles=None)  # the ensemble sample has no cycles
    check_tuning(free, Budget(1, cycles=25, trial_steps=1))


def test_only_methods_that_there_are(refused):
    task, method = SimpleNamespace(name="0.1"), SimpleNamespace(name="oi")
    experiment = SimpleNamespace(
        tasks=lambda _: [task], methods=lambda _: [method], forms=("adas_increment", "ungated")
    )
    check_only(experiment, (0.1,), ())
    check_only(experiment, (0.1,), ("oi", "ungated"))
    for name in ("kalman", "adas_official"):
        refused(
            rf"--only {name} is unknown: .* adas_inc.*, oi$",
            check_only,
            experiment,
            (0.1,),
            ("oi", name),
        )


def test_a_source_of_problems_alone_is_for_training_only(refused):
    refused(
        r"SimpleNamespace, which has no scores: .* fit only",
        experiment_of,
        SimpleNamespace(problem=None),
    )


def test_a_setting_that_a_method_refuses_is_named(refused):
    grid, samples = regular_grid(4, 8, poles=False), torch.randn(5, 1, 4, 8)
    method = Method(
        "oi",
        lambda s: HomogeneousCovariance.from_samples(samples, grid, length_km=s["length_km"]),
        {"length_km": (100.0, 1000.0)},
    )
    settings = {"oi@0.1": {"length_km": -5.0}}
    refused(
        r"setting of oi@0\.1 cannot .*length_km must be positive", built, settings, method, "0.1"
    )


def test_a_checkpoint_of_no_training_is_named(tmp_path, refused):
    for number, content in enumerate(({"state_dict": [1]}, {"a": torch.ones(1)})):
        path = tmp_path / f"{number}.ckpt"
        torch.save(content, path)
        refused(rf"{number}.ckpt is not a checkpoint of a training", load_trained, path, None)


def test_a_place_for_an_output(tmp_path, refused):
    (tmp_path / "file").touch()
    require_free(tmp_path / "new" / "x.zarr", overwrite=False)
    require_free(tmp_path / "file", overwrite=True)
    refused(
        "file exists: choose another --output or add --overwrite",
        require_free,
        tmp_path / "file",
        overwrite=False,
    )
    for below in ("file/x.zarr", "file/y/x.zarr"):
        refused(
            "is a file and no folder: choose another --output",
            require_free,
            tmp_path / below,
            overwrite=True,
        )


def test_damaged_pictures_are_named(tmp_path, refused):
    path = tmp_path / "cycles.safetensors"
    assert load_pictures(path) == {}
    save_file({"a|b": torch.ones(9)}, path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    refused(r"damaged .*: run `gates weather evaluate` again", load_pictures, path)
