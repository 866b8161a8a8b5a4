import json
from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parents[2] / "golden" / "attention_sequence"


@pytest.fixture
def vectors():
    """``vectors(name)``: the arrays of a file of golden vectors and its options."""

    def load(name, prefix=""):
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            names = [key for key in arrays if key.startswith(prefix) and not key.endswith("meta")]
            g = {key.removeprefix(prefix): torch.from_numpy(arrays[key]) for key in names}
            return g, json.loads(str(arrays[f"{prefix}meta"]))

    return load
