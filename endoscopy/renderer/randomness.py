"""Random numbers that depend on the seed and on the number of the object alone."""

from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """Independent streams of one object, so that an additional draw never shifts the others."""

    SCENE = 0
    CAMERA = 1
    SENSOR = 2
    DEPTH = 3


def numpy_generator(seed: int, index: int, purpose: Purpose) -> np.random.Generator:
    """Return the generator of one object for one purpose."""
    return np.random.default_rng([seed, index, purpose])


def torch_generator(seed: int, index: int, purpose: Purpose) -> torch.Generator:
    """Return the same for tensors."""
    state = np.random.SeedSequence([seed, index, purpose]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
