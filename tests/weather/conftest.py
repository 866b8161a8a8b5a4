"""A twin world of a few days on a coarse grid, made once a session, and networks for it."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from weather.experiments.twin.source import TwinSource
from weather.experiments.twin.world import TwinWorld
from weather.models.adas.network import Adas
from weather.models.shallow_water.model import ShallowWater

COARSE = {"truncation": 12, "num_latitudes": 16, "num_longitudes": 32, "time_step": 3600.0}


def coarse_model(stirring=4e-10):
    return ShallowWater(**COARSE, stirring=stirring, relaxation_days=4.0)


def coarse_world(path, **changes):
    arguments = {
        "cycles": 24,
        "num_tests": 2,
        "num_tuning": 2,
        "num_validation": 2,
        "num_training": 4,
        "spin_up_days": 10.0,
    } | changes
    return TwinWorld(coarse_model(), coarse_model(3.2e-10), str(path), **arguments)


@pytest.fixture(scope="session")
def real():
    """The folder of real files; a test that needs it is skipped where it is absent."""
    shared = Path(os.environ.get("GATES_SHARED", Path(__file__).parents[3] / "shared"))
    if not (shared / "data" / "weather").exists():
        pytest.skip(f"{shared} is absent: set GATES_SHARED")
    return shared / "data" / "weather"


@pytest.fixture(scope="session")
def twin(tmp_path_factory):
    """``twin.world``, ``twin.source(**changes)`` with its recording, ``twin.make(path)``."""
    folder = tmp_path_factory.mktemp("twin")
    world = coarse_world(folder / "nature.zarr")
    defaults = {
        "densities": (0.3, 0.1),
        "scales": (0.2, 0.3),
        "recorded_steps": 4,
        "block": 5,
        "transient": 3,
    }

    def source(**changes):
        return TwinSource(world, str(folder / "recording.safetensors"), **(defaults | changes))

    source().prepare()
    return SimpleNamespace(world=world, source=source, make=coarse_world, folder=folder)


@pytest.fixture(scope="session")
def small_adas():
    """``small_adas(**changes)`` builds a network of a few thousand weights for the twin world."""

    def build(seed=0, **changes):
        arguments = {
            "grid_shape": (16, 32),
            "num_surface": 3,
            "num_upper": 0,
            "num_levels": 0,
            "dim": 4,
            "patch_size": (2, 2),
            "window_size": (1, 2, 2),
            "num_heads": 2,
            "kernel_sizes": ((1, 3, 5), (1, 3, 3), (1, 3, 3)),
            "decoder_depth": 1,
            "drop_path": 0.0,
            "position": "latitude",
            "circular_longitude": True,
            "output": "increment",
        } | changes
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return Adas(**arguments)

    return build
