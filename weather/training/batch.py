"""One training step's worth of assimilation problems and the seeds they are drawn from."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from weather.observations.gridded import GriddedObservations


class AssimilationBatch(NamedTuple):
    """B assimilation problems, one for each timeline.

    Attributes:
        timeline: (B,) global numbers of the timelines, whatever rank holds them.
        reset: (B,) True where ``background`` is to be used; elsewhere the background is the
            forecast from the timeline's last analysis.
        background: (B,C,H,W) recorded background.
        truth: (B,C,H,W) the state to be found.
        observations: values and errors (B,C,H,W).
        background_sd: (B,C) expected standard deviation of the background error.
        model: (B,) number of the forecast model that carries the timeline.
    """

    timeline: Tensor
    reset: Tensor
    background: Tensor
    truth: Tensor
    observations: GriddedObservations
    background_sd: Tensor
    model: Tensor


def generator(*keys: int) -> torch.Generator:
    """Return a generator that depends on ``keys`` alone: a sample never depends on its neighbours.

    Every random draw of the data is a function of (seed, step, timeline), hence the same on one
    process and on many, and after a resume.
    """
    state = np.random.SeedSequence(keys).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
