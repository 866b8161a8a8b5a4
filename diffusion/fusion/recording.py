"""Mean gates of a run by layer and step, from a sample of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from core_gates.adapters import GatedLoraLinear
from core_gates.errors import GatesError
from diffusion.fusion.gated_fusion import GatedFusion
from diffusion.fusion.observing import Observer

TOKENS = 64
"""Tokens of a call whose gates are computed."""


class GateMap(NamedTuple):
    """Mean gates of adapters.

    Attributes:
        sites: Names of layers, in the order of the model.
        adapters: Names of the adapters.
        means: (steps, layers, adapters) from 0 to 1, over tokens and channels; NaN where an
            adapter does not change a layer.
    """

    sites: tuple[str, ...]
    adapters: tuple[str, ...]
    means: Tensor

    def by_adapter(self) -> dict[str, float]:
        """Return the mean gate of each adapter over the layers that it changes and all steps."""
        found = self.means.nanmean((0, 1)).tolist() if self.means.numel() else []
        return dict(zip(self.adapters, found, strict=False))


class GateRecorder(Observer):
    """Record the mean gates of a fusion while the model runs.

    It computes the gates of some evenly spaced tokens of the first sample of a call a second time,
    by hooks on the layers; what the model returns stays the same bits.

    Args:
        fusion: A fusion with gates, to be attached before this is entered.
        tokens: Of a call.

    Attributes:
        step: Which step the next calls belong to, from 0; calls of one step are averaged.
    """

    def __init__(self, fusion: GatedFusion, tokens: int = TOKENS) -> None:
        super().__init__(fusion)
        self._tokens, self.step = tokens, 0
        self._seen: dict[tuple[int, str], list[Tensor]] = {}

    def __enter__(self) -> Self:
        """Begin to record.

        Raises:
            GatesError: The fusion is not attached, or has no gates.
        """
        if self.fusion.mode != "gated":
            raise GatesError("gates are recorded of a fusion with mode='gated' only")
        return super().__enter__()

    @torch.no_grad()
    def see(self, site: str, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Keep the mean gates of a call."""
        del output
        assert isinstance(layer, GatedLoraLinear)
        first = args[0][:1] if args[0].ndim > 1 else args[0]
        if first.ndim > 2:
            count = first.shape[-2]
            places = torch.arange(0, count, -(-count // self._tokens), device=first.device)
            first = first.index_select(-2, places)
        time = None if layer.clock is None else layer.clock.time
        time = time if time is None or time.numel() == 1 else time[:1]
        gates = layer.gate_values(first, time=time)
        means = gates.float().mean(-1).flatten(0, -2).mean(0)[: len(self.held[site])]
        self._seen.setdefault((self.step, site), []).append(means.cpu())

    @property
    def gates(self) -> GateMap:
        """What has been recorded."""
        sites = tuple(self.held)
        steps = 1 + max((step for step, _ in self._seen), default=-1)
        names = tuple(self.fusion.adapters)
        means = torch.full((steps, len(sites), len(names)), float("nan"))
        for (step, site), found in self._seen.items():
            held = [names.index(name) for name in self.held[site]]
            means[step, sites.index(site), held] = torch.stack(found).mean(0)
        return GateMap(sites, names, means)


def records_of(gates: GateMap) -> Mapping[str, Any]:
    """Return a gate map as plain values: for each adapter its mean, by layer and by step."""
    found = {}
    for place, name in enumerate(gates.adapters):
        means = gates.means[:, :, place]
        found[name] = {
            "mean": float(means.nanmean()),
            "by_layer": dict(zip(gates.sites, means.nanmean(0).tolist(), strict=True)),
            "by_step": means.nanmean(1).tolist(),
        }
    return found
