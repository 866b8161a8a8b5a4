import json
from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parents[2] / "golden" / "recsys"


@pytest.fixture
def vectors():
    """``vectors(name)``: the arrays of a file as tensors, and its ``config`` as a dictionary."""

    def load(name):
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            config = json.loads(str(arrays["config"]))
            kept = {key: torch.from_numpy(arrays[key]) for key in arrays if key != "config"}
        return config, kept

    return load
