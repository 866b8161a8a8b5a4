"""The sum of adapters with tuned strengths."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from core_gates.errors import GatesError
from diffusion.lora_file import LoraBundle
from diffusion.rivals.sum import Sum


class Weighted(Sum):
    """Weigh adapters by their place, with two numbers that are tuned on other pairs.

    By convention the first adapter is the subject and the others are styles.

    Args:
        model: See :class:`diffusion.fusion.GatedFusion`.
        adapters: Name -> adapter, the subject first.
        first: Factor of the first adapter.
        others: Factor of the others.

    Raises:
        GatesError: An adapter does not fit the model, or a factor is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: Mapping[str, LoraBundle],
        *,
        first: float = 1.0,
        others: float = 1.0,
    ) -> None:
        if not abs(first) + abs(others) < float("inf"):
            raise GatesError(f"factors {first} and {others} must be finite numbers")
        super().__init__(model, adapters)
        self.first, self.others = first, others

    def _weights(self) -> list[float]:
        factors = [self.first, *[self.others] * len(self.strengths)]
        return [f * s for f, s in zip(factors, self.strengths.values(), strict=False)]
