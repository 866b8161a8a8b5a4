"""Gates folded into one static adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from diffusion.fusion.baking import MeanGates, bake
from diffusion.fusion.gated_fusion import GatedFusion
from diffusion.lora_file import LoraBundle
from diffusion.rivals.merged import Merged


class Baked(Merged):
    """Use the mean of the gates of some runs as if gates did not depend on the input.

    Args:
        model: See :class:`diffusion.fusion.GatedFusion`.
        adapters: Name -> adapter.
        observe: Runs the model on inputs whose gates are averaged, with gates in force.
        gates: File of trained gates.
        options: Further options of :class:`diffusion.fusion.GatedFusion`.

    Raises:
        GatesError: An adapter or the gates do not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: Mapping[str, LoraBundle],
        *,
        observe: Callable[[], object],
        gates: str | Path | None = None,
        **options: Any,
    ) -> None:
        def merge(on: Mapping[str, LoraBundle], strengths: Mapping[str, float]) -> LoraBundle:
            fusion = GatedFusion(model, on, gates=gates, **options)
            fusion.set_strengths(strengths)
            with fusion, MeanGates(fusion) as observed:
                observe()
            return bake(fusion, observed.means)

        super().__init__(model, adapters, merge)
