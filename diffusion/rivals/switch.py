"""One adapter at a time, by denoising steps."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from core_gates.errors import GatesError
from diffusion.lora_file import LoraBundle
from diffusion.rivals.weighing import Weighing


class Switch(Weighing):
    """LoRA Switch (Zhong et al., 2024): at step i only adapter ⌊i/τ⌋ mod K is in force.

    Those with strength 0 have no steps.

    Args:
        model: See :class:`diffusion.fusion.GatedFusion`.
        adapters: Name -> adapter.
        tau: Steps that an adapter stays in force.

    Raises:
        GatesError: An adapter does not fit the model, or ``tau`` is below 1.
    """

    def __init__(
        self, model: nn.Module, adapters: Mapping[str, LoraBundle], *, tau: float = 5
    ) -> None:
        if tau < 1:
            raise GatesError(f"tau is {tau}, expected at least one step")
        super().__init__(model, adapters)
        self.tau, self._step = tau, 0

    def at(self, step: int, steps: int) -> None:
        """Put the adapter of a step in force."""
        del steps
        self._step = step
        self._weigh()

    def _weights(self) -> list[float]:
        on = self.on
        return self._only(on[int(self._step // self.tau) % len(on)] if on else None)
