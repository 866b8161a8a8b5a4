"""Gates folded into a static adapter: for programs that know no gates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from core_gates.adapters import GatedLoraLinear, LoraGate
from core_gates.errors import GatesError
from diffusion.fusion.gated_fusion import GatedFusion
from diffusion.fusion.observing import Observer
from diffusion.fusion.stacking import plain_factors, stacked
from diffusion.lora_file import Factors, LoraBundle
from diffusion.lora_file.family import Placed

BLOCK = 256
"""Tokens at a time for which gates are computed in full."""

Means = Mapping[str, Mapping[str, Tensor]]
"""Site -> name of an adapter -> mean gate of each output (D,)."""


class MeanGates(Observer):
    """Observe the gates of a fusion while the model runs, each token of each call alike.

    The gates of all adapters exist for a block of tokens at a time. The base output is computed a
    second time for it, so observing is slow; detach it when enough is seen.

    Example:
        >>> with fusion, MeanGates(fusion) as observed:
        ...     pipe(prompt)
        >>> save_lora(bake(fusion, observed.means), "fused.safetensors")

    Args:
        fusion: A fusion, which has to be attached before this is entered.
        block: Tokens at a time.
    """

    def __init__(self, fusion: GatedFusion, block: int = BLOCK) -> None:
        super().__init__(fusion)
        self._block = block
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    @property
    def means(self) -> dict[str, dict[str, Tensor]]:
        """Site -> name of an adapter -> mean gate of each output (D,), in float64."""
        return {
            site: dict(zip(self.held[site], total / self._counts[site], strict=True))
            for site, total in self._sums.items()
        }

    @torch.no_grad()
    def see(self, site: str, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Add the gates of a call."""
        del output
        assert isinstance(layer, GatedLoraLinear)
        x, known = args[0], len(self.held[site])
        for part, time in self._blocks(layer, x):
            gates = layer.gate_values(part, time=time)[..., :known, :]
            total = gates.double().flatten(0, -3).sum(0)
            self._sums[site] = self._sums[site] + total if site in self._sums else total
        self._counts[site] = self._counts.get(site, 0) + x[..., 0].numel()

    def _blocks(self, layer: GatedLoraLinear, x: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Return some tokens of one sample after another, with their time."""
        time = None if layer.clock is None else layer.clock.time
        samples = x.unsqueeze(0) if x.ndim == 1 else x
        for index, sample in enumerate(samples):
            own = time if time is None or time.numel() == 1 else time[index : index + 1]
            for part in sample.reshape(-1, x.shape[-1]).split(self._block):
                yield part.unsqueeze(0), own


def bake(fusion: GatedFusion, means: Means) -> LoraBundle:
    """Return one static adapter that does what the gates do on average.

    The rows of B of each adapter are multiplied by its strength, its mean gate and the output
    weight of the gate, and the adapters put side by side, so ranks add up. It is exact where gates
    do not depend on the input. Parts for text encoders are left out.

    Args:
        fusion: Adapters with their strengths and gates, attached or not.
        means: Mean gates, see :class:`MeanGates`.

    Raises:
        GatesError: No mean is known where an adapter changes a layer, or one is a DoRA.
    """
    modules: dict[str, Factors] = {}
    for site in fusion.sites:
        gate, start = fusion.gate(site.name), 0
        rows = _rows(fusion, site, means.get(site.name, {}))
        for part, size in zip(site.parts, site.sizes, strict=True):
            found = plain_factors(fusion.adapters, part)
            on = [name for name in found if fusion.strengths[name] != 0]
            weights = [fusion.strengths[name] * rows[name][start : start + size] for name in on]
            if isinstance(gate, LoraGate):
                out = gate.weight_out.detach().double().cpu()[start : start + size]
                weights = [weight * out for weight in weights]
            if on:
                modules[part] = stacked([found[name] for name in on], weights)
            start += size
    families = {bundle.family for bundle in fusion.adapters.values()}
    return LoraBundle(fusion.family or families.pop(), modules)


def _rows(fusion: GatedFusion, site: Placed, known: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the mean gates of the adapters that change a site."""
    rows = {}
    for name, bundle in fusion.adapters.items():
        if not any(part in bundle.modules for part in site.parts):
            continue
        mean = known.get(name)
        if mean is None or mean.shape != (site.out_features,):
            what = "no mean gates" if mean is None else f"{mean.numel()} mean gates"
            raise GatesError(
                f"{what} of adapter {name!r} at {site.name} are known, expected"
                f" {site.out_features}: observe a run with these adapters"
            )
        rows[name] = mean.detach().double().cpu()
    return rows
