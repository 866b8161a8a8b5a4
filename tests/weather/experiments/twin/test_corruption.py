from pathlib import Path

import pytest
import torch
import yaml
from torch.testing import assert_close

import apps
import weather
from weather.baselines.assimilator import FreeRun
from weather.experiments.twin.twin_experiment import _variants, corrupt_half
from weather.experiments.twin.twin_tasks import TwinEvaluation, TwinTask
from weather.experiments.twin.world import TwinWorld
from weather.models.adas.analysis import AnalysisForm
from weather.models.shallow_water.model import ShallowWater
from weather.observations.gridded import GriddedObservations

WEIGHTS = Path(weather.__file__).parent / "weights" / "osse_shallow_water" / "weights"
CONFIG = Path(apps.__file__).parent / "weather" / "configs" / "osse_shallow_water.yaml"


def test_half_of_the_points_are_corrupted_as_declared():
    truth = torch.randn(2, 3, 40, 50, generator=torch.Generator().manual_seed(1))
    errors = torch.full_like(truth, 2.0)
    clean = GriddedObservations(truth + 0.1, errors).withhold(truth[:, :1] < 0.5)
    without, declared, denied, forced = _variants(truth, clean, torch.Generator().manual_seed(2))
    assert torch.equal(declared.mask, clean.mask)
    assert torch.equal(denied.mask, clean.mask)
    hit = clean.mask & ~without.mask
    assert_close(float(hit.sum() / clean.mask.sum()), 0.5, rtol=0, atol=0.03)
    assert torch.equal(hit[:, 0], hit[:, 2])  # all variables of a station
    kept = without.mask
    for variant in (without, declared, denied, forced):
        assert torch.equal(variant.values[kept], clean.values[kept])
        assert torch.equal(variant.errors[kept], clean.errors[kept])
    assert (declared.errors[hit] == 10.0).all()
    assert (denied.errors[hit] == 2.0).all()
    assert_close(forced.errors[hit], torch.full_like(forced.errors[hit], 0.02))
    assert torch.equal(declared.values, denied.values)
    assert torch.equal(declared.values, forced.values)
    assert abs(float(((declared.values - truth)[hit] / 10.0).std()) - 1) < 0.03


@pytest.fixture
def evaluation(twin):
    return TwinEvaluation(twin.world, (0.3,), cycles=18)


def test_optimal_interpolation_knows_what_it_is_told(evaluation):
    oi = next(method for method in evaluation.classical() if method.name == "oi")
    ticks = []
    method = oi.build({"scale": 0.3, "length_km": 2000.0})
    task = TwinTask(0.3, "perfect")
    ratios = corrupt_half(task, evaluation, method, tick=lambda: ticks.append(1))
    assert ratios.declared < 1.05
    assert 1.10 < ratios.denied < ratios.forced
    assert len(ticks) == 18
    assert corrupt_half(task, evaluation, method) == ratios


def test_a_method_that_does_not_look_is_not_corrupted(evaluation):
    assert corrupt_half(TwinTask(0.3, "perfect"), evaluation, FreeRun()) == (1.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def real_evaluation(tmp_path_factory):
    """Shallow water at T21 as in the shipped experiment, for a few days."""
    config = yaml.safe_load(CONFIG.read_text())["data"]["source"]["init_args"]["world"]["init_args"]
    models = [ShallowWater(**config[name]["init_args"]) for name in ("model", "imperfect")]
    path = tmp_path_factory.mktemp("world") / "nature.zarr"
    sizes = {"num_tests": 2, "num_tuning": 1, "num_validation": 1, "num_training": 2}
    world = TwinWorld(*models, str(path), cycles=24, spin_up_days=40.0, **sizes)
    world.prepare()
    return TwinEvaluation(world, (0.1,))


@pytest.mark.costly("the shipped network, cycled for six days")
def test_shipped_weights_heed_declared_errors(real_evaluation):
    analysis = AnalysisForm().load(WEIGHTS / "adas_increment-s0")
    assert analysis.background_error == "innovation"
    ratios = corrupt_half(TwinTask(0.1, "perfect"), real_evaluation, analysis)
    assert ratios.declared <= 1.05
    assert ratios.denied >= 1.10
    assert ratios.forced >= 1.10
