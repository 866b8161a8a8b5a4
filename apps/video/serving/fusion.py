"""The fused score as options of a command: exponents and offsets of tasks."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from core_gates.errors import GatesError
from video_multitask.fused_score import FusedScore

Powers = Mapping[str, float]
LARGEST = float(np.finfo(np.float32).max)


class Fusion:
    """The fused score of rows, see :class:`video_multitask.fused_score.FusedScore`.

    Args:
        tasks: Tasks of the model, in the order of the probabilities.
        exponents: Exponents by name of the task; a task not named does not count.
        offsets: Added to the probabilities, by name of the task; 0 where not given.

    Attributes:
        settings: What it was made of, in values of JSON.

    Raises:
        GatesError: A task is unknown, a number makes no score, or scores can overflow.
    """

    def __init__(self, tasks: Sequence[str], exponents: Powers, offsets: Powers | None) -> None:
        numbers = [*exponents.values(), *(offsets or {}).values()]
        if not all(abs(number) <= LARGEST for number in numbers):
            raise GatesError(f"the fused score needs finite numbers, got {numbers}")
        try:
            self._score = FusedScore(tasks, exponents, offsets)
        except ValueError as error:
            raise GatesError(str(error)) from error
        if self._largest(exponents, offsets or {}) > math.log(sys.float_info.max):
            raise GatesError(
                f"the fused score can exceed {sys.float_info.max:.0e}, got {numbers}: "
                "choose smaller ones, a multiple of them orders alike"
            )
        self.settings: dict[str, Any] = {
            "exponents": dict(exponents),
            "offsets": dict(offsets or {}),
        }

    @staticmethod
    def _largest(exponents: Powers, offsets: Powers) -> float:
        """Return the logarithm of the largest score that any probabilities give."""
        largest = 0.0
        for name, exponent in exponents.items():
            offset = offsets.get(name, 0.0)
            if exponent:
                largest += exponent * math.log(offset + 1 if exponent > 0 else offset)
        return largest

    def __call__(self, probabilities: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return the scores (N,) of probabilities (N, T)."""
        found: NDArray[np.float64] = self._score(torch.from_numpy(probabilities).double()).numpy()
        return found


def fusion_of(
    tasks: Sequence[str], exponents: Powers | None, offsets: Powers | None
) -> Fusion | None:
    """Return the fused score that options ask for; None if they name no exponent.

    Raises:
        GatesError: There are offsets alone, or see :class:`Fusion`.
    """
    if not exponents and offsets:
        raise GatesError("--offsets belong to a fused score: name the exponents by --fused")
    return Fusion(tasks, exponents, offsets) if exponents else None
