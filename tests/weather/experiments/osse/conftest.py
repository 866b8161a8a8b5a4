"""A sealed world of a week on a coarse grid, and networks for it."""

import pytest
import torch

from tests.weather.conftest import coarse_model
from weather.experiments.osse.osse_experiment import OsseExperiment
from weather.experiments.osse.sealed_world import OsseWorld
from weather.models.adas.analysis import AdasAnalysis, AnalysisForm
from weather.state import Normalizer

COUNTS = {"num_tests": 1, "num_tuning": 1, "num_validation": 1, "num_training": 4}


def world(folder, **changes):
    options = {"cycles": 30, "spin_up_days": 10.0, **COUNTS} | changes
    return OsseWorld(coarse_model(), coarse_model(3.95e-10), f"{folder}/nature.zarr", **options)


@pytest.fixture(scope="session")
def folder(tmp_path_factory, small_adas):
    """A folder of two worlds, recordings, and networks of the seeds 0 and 1 of the gated form."""
    path = tmp_path_factory.mktemp("osse")
    for seed in (0, 1):
        network = small_adas(seed)
        units = Normalizer(torch.tensor([1e4, 0.0, 0.0]), torch.tensor([200.0, 10.0, 10.0]))
        target = path / f"weights/adas_increment-s{seed}"
        target.mkdir(parents=True)
        with torch.no_grad():
            for weight in network.parameters():
                weight += 0.02 * torch.randn(weight.shape, generator=torch.manual_seed(seed))
        AnalysisForm().save(target, AdasAnalysis(network, units, torch.tensor([30.0, 2.0, 2.0])))
    experiment(path)
    return path


def experiment(folder, protocol="osse", **changes):
    made = OsseExperiment(
        world(folder),
        str(folder),
        str(folder),
        protocol=protocol,
        num_sealed=5,
        densities=(0.3, 0.1),
        **changes,
    )
    made.make_truth()
    return made
