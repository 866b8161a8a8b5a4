from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture(scope="session")
def vectors():
    """``vectors("endoscopy/NAME")``: the arrays of a file of golden vectors; text stays text."""

    def load(name):
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            return {
                key: str(value) if value.dtype.kind == "U" and value.ndim == 0
                else value if value.dtype.kind == "U"
                else torch.from_numpy(value)
                for key, value in arrays.items()
            }  # fmt: skip

    return load
