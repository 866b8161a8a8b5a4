"""Strengths of adapters in every layer, learned as gates are: what gates are without looking."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from diffusion.fusion.baking import bake
from diffusion.fusion.gated_fusion import GatedFusion
from diffusion.lora_file import LoraBundle


class LayerStrengths(GatedFusion):
    """Add the outputs of adapters with factors that are trained as gates are: ``o + Σ c y_k``.

    In every layer ``c`` is a number for any adapter, plus one for a subject or a style where roles
    are told; there are others where there are more than two adapters, and all are 1 at the start.
    They serve any adapters in any order, and do not depend on the input, the time, the place or the
    feature: one static adapter does the same. Layers that published gates see fused share theirs.

    Args:
        model: See :class:`diffusion.fusion.GatedFusion`.
        adapters: Name -> adapter.
        options: Of :class:`diffusion.fusion.GatedFusion`.

    Raises:
        GatesError: An adapter does not fit the model.
    """

    def __init__(
        self, model: nn.Module, adapters: Mapping[str, LoraBundle], **options: Any
    ) -> None:
        super().__init__(model, adapters, mode="strengths", **options)

    @property
    def bundle(self) -> LoraBundle:
        """One static adapter that does the same, strengths included.

        Raises:
            GatesError: An adapter is a DoRA.
        """
        means = {
            site.name: dict.fromkeys(self.adapters, torch.ones(site.out_features))
            for site in self.sites
        }
        return bake(self, means)
