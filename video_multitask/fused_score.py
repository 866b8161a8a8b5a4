"""One score from the probabilities of many behaviours: Π (α_t + p_t)^β_t."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from core_gates.errors import GatesError, check_at_least


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
