"""Files of adapters that tests of several rooms share."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.fixture(scope="session")
def dialects():
    """The independent writer: ``write``, ``product``, ``NAMES``, ``PREFIXES``, ``kinds_of`` …"""
    return SimpleNamespace(**runpy.run_path(str(FIXTURES / "lora_writer.py")))


@pytest.fixture(scope="session")
def relative_error():
    """The largest error of the layers of a bundle, relative to the largest entry of each ΔW."""

    def measure(bundle, expected, base=None):
        assert set(bundle.modules) == set(expected)
        errors = []
        for name, delta in expected.items():
            weight = None if base is None else base[name]
            found = bundle.delta_weight(name, weight).double().numpy()
            errors.append(np.abs(found - delta).max() / np.abs(delta).max())
        return max(errors)

    return measure
