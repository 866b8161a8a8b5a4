"""Adapters that are merged into one, which is then in force."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Self

import torch
from torch import nn

from core_gates.errors import GatesError
from diffusion.fusion.attachable import Attachable
from diffusion.fusion.gated_fusion import GatedFusion
from diffusion.fusion.sites import family_of, linear_sizes, refuse_misfits
from diffusion.fusion.stacking import one_family
from diffusion.lora_file import LoraBundle

Merge = Callable[[Mapping[str, LoraBundle], Mapping[str, float]], LoraBundle]
"""Makes one adapter of those whose strength is not 0, and their strengths."""


class Merged(Attachable, nn.Module):
    """One static adapter made of several.

    Args:
        model: See :class:`diffusion.fusion.GatedFusion`.
        adapters: Name -> adapter.
        merge: Called for the adapters, and again when they or their strengths change.

    Attributes:
        bundle: The adapter that is in force.

    Raises:
        GatesError: An adapter does not fit the model, or they cannot be merged.
    """

    def __init__(self, model: nn.Module, adapters: Mapping[str, LoraBundle], merge: Merge) -> None:
        super().__init__()
        self._merge = merge
        self._fusion, self._attached = GatedFusion(model, {}, mode="sum"), False
        self._use(dict(adapters), dict.fromkeys(adapters, 1.0))

    @property
    def model(self) -> nn.Module:
        """The model; it is not a part of this module."""
        return self._fusion.model

    @property
    def attached(self) -> bool:
        """Whether the adapter is in force, also one that changes nothing."""
        return self._attached

    def attach(self) -> Self:
        """Put the adapter in force.

        Raises:
            GatesError: It is, or the model has others.
        """
        if self._attached:
            raise GatesError("the model has adapters already, those of this: detach them first")
        self._fusion.attach()
        self._attached = True
        return self

    def detach(self) -> None:
        """Leave the model with its own layers, the same objects with the same bits."""
        self._fusion.detach()
        self._attached = False

    def set_adapters(self, adapters: Mapping[str, LoraBundle]) -> None:
        """Merge other adapters; strengths are 1 again.

        Raises:
            GatesError: One does not fit the model, or they cannot be merged; the old ones stay.
        """
        self._use(dict(adapters), dict.fromkeys(adapters, 1.0))

    def set_strengths(self, strengths: Mapping[str, float]) -> None:
        """Merge with other strengths; adapters with strength 0 are left out.

        Raises:
            GatesError: There is no adapter of a name, or a strength is not finite.
        """
        if unknown := sorted(strengths.keys() - self.adapters.keys()):
            raise GatesError(
                f"no adapter is named {unknown[0]!r}; there are {', '.join(self.adapters)}"
            )
        found = self.strengths | {name: float(value) for name, value in strengths.items()}
        if not torch.tensor(list(found.values())).isfinite().all():
            raise GatesError(f"strengths {dict(strengths)} must be finite numbers")
        self._use(self.adapters, found)

    def at(self, step: int, steps: int) -> None:
        """Nothing changes from one step to the next."""

    def _use(self, adapters: dict[str, LoraBundle], strengths: dict[str, float]) -> None:
        if self._attached:
            self._fusion.detach()
        try:
            bundle = self._merged(adapters, strengths)
            made = GatedFusion(self.model, {"merged": bundle}, mode="sum")
        except BaseException:
            if self._attached:
                self._fusion.attach()
            raise
        self._fusion, self.bundle = made, bundle
        self.adapters, self.strengths = adapters, strengths
        if self._attached:
            self._fusion.attach()

    def _merged(
        self, adapters: Mapping[str, LoraBundle], strengths: Mapping[str, float]
    ) -> LoraBundle:
        refuse_misfits(adapters, family_of(self.model), linear_sizes(self.model))
        on = {name: bundle for name, bundle in adapters.items() if strengths[name] != 0}
        if not on:
            return LoraBundle(one_family(adapters), {})
        return self._merge(on, {name: strengths[name] for name in on})
