"""One score from many behaviours: Π (α_t + p_t)^β_t."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core_gates.errors import GatesError, check_at_least

Powers = Mapping[str, float]
LARGEST = float(np.finfo(np.float32).max)


class FusedScore:
    """The product of powers by which a feed orders its candidates.

    Where α is large, a behaviour counts nearly linearly and cannot dominate; where it is 0, in
    proportion, so that a probability of 0 vetoes. Negative exponents lower the rank of what is
    likely to be skipped or hated.

    Args:
        tasks: Names of the T tasks, in the order of the probabilities.
        exponents: β by name; tasks without one do not count.
        offsets: α by name; 0 where not given.

    Raises:
        ValueError: A name is unknown, no exponent is given, or an offset is negative or is 0 where
            the exponent is negative.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        exponents: Mapping[str, float],
        offsets: Mapping[str, float] | None = None,
    ) -> None:
        offsets = dict(offsets or {})
        if strangers := sorted({*exponents, *offsets} - set(tasks)):
            raise ValueError(
                f"the fused score names {', '.join(strangers)}; the tasks are {', '.join(tasks)}"
            )
        if not any(exponents.values()):
            raise ValueError("the fused score needs an exponent other than 0 for one task at least")
        check_at_least(0, **{f"offset of {name}": value for name, value in offsets.items()})
        for name, beta in exponents.items():
            if beta < 0 and not offsets.get(name, 0.0):
                raise ValueError(
                    f"{name} has the exponent {beta} and no offset: a probability of 0 would give "
                    "an infinite score; give it an offset such as 0.1"
                )
        self.tasks = tuple(tasks)
        self.alpha = torch.tensor([offsets.get(name, 0.0) for name in tasks])
        self.beta = torch.tensor([float(exponents.get(name, 0.0)) for name in tasks])

    def log(self, probabilities: Tensor) -> Tensor:
        """Return the logarithm of the score, which orders alike and does not underflow.

        Args:
            probabilities: (..., T).

        Returns:
            (...), −∞ where a task without offset has a probability of 0.

        Raises:
            GatesError: The number of tasks is another one.
        """
        if probabilities.shape[-1] != len(self.tasks):
            raise GatesError(
                f"got probabilities of {probabilities.shape[-1]} tasks, the fused score has "
                f"{len(self.tasks)}"
            )
        counted = self.beta != 0
        base = self.alpha.to(probabilities)[counted] + probabilities[..., counted]
        return (self.beta.to(probabilities)[counted] * base.log()).sum(-1)

    def __call__(self, probabilities: Tensor) -> Tensor:
        """Return the score (...) of probabilities (..., T)."""
        return self.log(probabilities).exp()

    def rank(self, probabilities: Tensor, top: int | None = None) -> Tensor:
        """Return the candidates of a list by descending score.

        Args:
            probabilities: (N, T).
            top: Candidates that are kept; all if None.

        Returns:
            Their numbers (min(N, top),); equal scores keep their order.
        """
        order = self.log(probabilities).argsort(descending=True, stable=True)
        return order if top is None else order[:top]


class Fusion:
    """The fused score of rows, see `video_multitask.scorer.FusedScore`.

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
        scores: NDArray[np.float64] = self._score(torch.from_numpy(probabilities).double()).numpy()
        return scores


def fusion_of(
    tasks: Sequence[str], exponents: Powers | None, offsets: Powers | None
) -> Fusion | None:
    """Return the fused score that options ask for; None if they name no exponent.

    Raises:
        GatesError: There are offsets alone, or see `Fusion`.
    """
    if not exponents and offsets:
        raise GatesError("--offsets belong to a fused score: name the exponents by --fused")
    return Fusion(tasks, exponents, offsets) if exponents else None
