"""What methods have in common that add the outputs of adapters, each with a number."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.utils.hooks import RemovableHandle

from diffusion.fusion.gated_fusion import GatedFusion
from diffusion.lora_file import LoraBundle


class Weighing(GatedFusion):
    """Add the outputs of adapters, ``o + Σ a_k y_k``.

    Args:
        model: See :class:`diffusion.fusion.GatedFusion`.
        adapters: Name -> adapter.

    Raises:
        GatesError: An adapter is of another family or does not fit the model.
    """

    def __init__(self, model: nn.Module, adapters: Mapping[str, LoraBundle]) -> None:
        super().__init__(model, adapters, mode="sum")
        self._handles: list[RemovableHandle] = []

    @property
    def on(self) -> list[str]:
        """Names of the adapters whose strength is not 0."""
        return [name for name, strength in self.strengths.items() if strength != 0]

    def detach(self) -> None:
        """Leave the model with its own layers and without hooks."""
        super().detach()
        while self._handles:
            self._handles.pop().remove()

    def _only(self, chosen: str | None) -> list[float]:
        """Return weights with which one adapter alone is in force."""
        return [s if name == chosen else 0.0 for name, s in self.strengths.items()]
