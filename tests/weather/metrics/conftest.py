from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from weather.grid import Grid

GOLDEN = Path(__file__).parents[2] / "golden" / "weather"


@pytest.fixture(params=["wb2_asc_with_poles", "wb2_desc_no_poles"])
def golden(request):
    """Fields (variable, time, level, H, W), their scores, in either latitude order."""
    with np.load(GOLDEN / f"{request.param}.npz") as file:
        vectors = {
            name: torch.from_numpy(file[name]) for name in file if file[name].dtype.kind == "f"
        }
    grid = Grid(vectors["latitude"], vectors["longitude"])
    ensemble = vectors["ensemble"].transpose(0, 1)  # members first
    return SimpleNamespace(**vectors, grid=grid, weights=grid.area_weights(), members=ensemble)


@pytest.fixture
def same():
    """Compare with a golden vector: relative 1e-10, NaN equal to NaN."""

    def check(actual, expected):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10, equal_nan=True)

    return check
