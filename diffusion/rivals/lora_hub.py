"""Strengths of adapters that a search without gradients finds for a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import nn

from core_gates.errors import GatesError
from diffusion.fusion.naming import Adapters, by_name
from diffusion.lora_file import LoraBundle
from diffusion.rivals.sum import Sum

BOUND = 1.5
"""Largest absolute value of a learned factor, as in LoraHub."""


class _SpentError(Exception):
    """No evaluation is left."""


class LoraHub(Sum):
    """LoraHub (Huang et al., 2023): learn one factor per adapter from the losses of a few examples.

    The search starts from zeros, stays within ±1.5 and adds ``regularization`` times the mean
    absolute factor to the loss, as published. The paper adds factors A and B of the adapters
    separately; here their outputs are added, so that ranks may differ and nothing is added that no
    adapter has. The examples are those of one task, so it has to see the pair.

    Args:
        model: See :class:`diffusion.fusion.GatedFusion`.
        adapters: Name -> adapter.
        regularization: Weight of the mean absolute factor.

    Attributes:
        learned: Name -> factor, 1 before a search; it multiplies the strength.

    Raises:
        GatesError: An adapter does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: Mapping[str, LoraBundle],
        *,
        regularization: float = 0.05,
    ) -> None:
        super().__init__(model, adapters)
        self.regularization = regularization
        self.learned = dict.fromkeys(adapters, 1.0)

    def set_adapters(self, adapters: Adapters) -> None:
        """Exchange the adapters; what was learned is forgotten, strengths are 1 again."""
        adapters = by_name(adapters)
        before, self.learned = self.learned, dict.fromkeys(adapters, 1.0)
        try:
            super().set_adapters(adapters)
        except BaseException:
            self.learned = before
            raise

    def search(self, loss: Callable[[], float], budget: int = 40) -> dict[str, float]:
        """Learn the factors by COBYLA (Powell, 1994); the best that were tried stay in force.

        Args:
            loss: Runs the model on the examples and returns their loss; it is called while this is
                attached, and should return the same for the same factors.
            budget: Number of calls.

        Returns:
            Name -> factor.

        Raises:
            GatesError: This is not attached, there is no budget, or a loss is not finite.
        """
        if not self.attached or budget < 1:
            what = f"the budget is {budget}" if self.attached else "adapters are not attached"
            raise GatesError(f"{what}: attach them, and allow at least one evaluation")
        from scipy.optimize import minimize  # slow to import, and needed here alone

        before, tried = self.learned, list[tuple[float, dict[str, float]]]()

        def value(factors: Any) -> float:
            if len(tried) >= budget:
                raise _SpentError
            inside = np.clip(factors, -BOUND, BOUND)
            self.learned = dict(zip(self.adapters, map(float, inside), strict=True))
            self._weigh()
            found = float(loss()) + self.regularization * float(np.abs(inside).mean())
            if not np.isfinite(found):
                raise GatesError(f"the loss is {found} at {self.learned}: it must be finite")
            tried.append((found, self.learned))
            return found

        try:
            bounds = [(-BOUND, BOUND)] * len(self.adapters)
            start = np.zeros(len(self.adapters))
            least = len(self.adapters) + 2  # COBYLA warns of fewer; the budget ends it before
            options = {"maxiter": max(budget, least), "rhobeg": 0.5}
            minimize(value, start, method="COBYLA", bounds=bounds, options=options)
        except _SpentError:
            pass
        except BaseException:
            self.learned = before
            self._weigh()
            raise
        self.learned = min(tried, key=lambda pair: pair[0])[1]
        self._weigh()
        return self.learned

    def _weights(self) -> list[float]:
        return [self.learned[name] * strength for name, strength in self.strengths.items()]
