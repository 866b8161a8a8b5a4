import json
from pathlib import Path

import numpy as np
import pytest
import torch

from core_gates.attention.sma.layer import SeqBoatLayer

GOLDEN = Path(__file__).parents[3] / "golden" / "attention_sequence"


@pytest.fixture
def vectors():
    """``vectors(name)``: the arrays of a file of golden vectors and its options."""

    def load(name, prefix=""):
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            names = [key for key in arrays if key.startswith(prefix) and not key.endswith("meta")]
            g = {key.removeprefix(prefix): torch.from_numpy(arrays[key]) for key in names}
            return g, json.loads(str(arrays[f"{prefix}meta"]))

    return load


@pytest.fixture
def lively_layer():
    """``lively_layer(**options)``: a layer in float64 that activates about half of its tokens."""

    def build(seed=0, **options):
        torch.manual_seed(seed)
        options = {"num_states": 3, "window": 3, "max_positions": 9} | options
        layer = SeqBoatLayer(8, 4, 6, **options).double()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(torch.randn_like(parameter) / 2)
        return layer

    return build
