"""Strengths of adapters in every layer, learned as gates are: what gates are without looking."""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from core_gates.adapters import GatedLoraLinear, LowRank, OpenGate
from core_gates.errors import GatesError
from diffusion.fusion.gated_fusion import DOT
from diffusion.fusion.protocol import Adapters, by_name, modules_of, plain_factors, stacked
from diffusion.lora_file import LoraBundle
from diffusion.lora_file.container import listed
from diffusion.lora_file.family import Placed
from diffusion.rivals.weighing import Weighing
from diffusion.rivals.x_lora import owners, refuse_magnitudes


class KindWeightedLora(GatedLoraLinear):
    """Add the outputs of adapters, that of the first with a factor, those of others with another.

    Args:
        base: The layer.
        adapters: Its adapters, in order, without magnitudes; rank 0 where one does nothing.
        factors: Of the first adapter and of the others (2, 2), those of two adapters and those of
            more, which stay outside of this module.
    """

    kinds: Tensor
    many: int

    def __init__(self, base: nn.Module, adapters: Sequence[LowRank], factors: Tensor) -> None:
        super().__init__(base, adapters, gate=OpenGate(cast(int, base.out_features)))
        self._factors = (factors,)

    def set_adapters(self, adapters: Sequence[LowRank]) -> None:
        """Exchange the adapters.

        Raises:
            ValueError: The factors of one do not fit the layer.
        """
        super().set_adapters(adapters)
        self.kinds = owners([adapter.rank for adapter in adapters]).clamp(max=1)
        self.many = int(len(adapters) > 2)

    def forward(self, x: Tensor, *, time: Tensor | None = None) -> Tensor:
        """Return the output (..., D') of the layer with the weighed adapters."""
        del time
        base: Tensor = self.base(x)
        if not self.ranks:
            return base
        hidden = self.hidden(x)
        hidden = hidden * self._factors[0][self.many, self.kinds].to(x.device, hidden.dtype)
        return base + (hidden @ self.up.to(x.device, hidden.dtype)).to(base.dtype)


class LayerStrengths(Weighing):
    """Add the outputs of adapters with factors that are trained as gates are: ``o + Σ c y_k``.

    In every layer the first adapter, by convention the subject, has its factor ``c``, and all
    others have theirs; there are other factors where there are more than two adapters, and all are
    1 at the start. They serve any adapters in that order, and do not depend on the input, the time,
    the place or the feature: one static adapter does the same.

    Args:
        model: See :class:`diffusion.fusion.GatedFusion`.
        adapters: Name -> adapter, the subject first; no DoRA.

    Raises:
        GatesError: An adapter does not fit the model or is a DoRA.
    """

    def __init__(self, model: nn.Module, adapters: Mapping[str, LoraBundle]) -> None:
        refuse_magnitudes(adapters)
        super().__init__(model, adapters)
        self.factors = nn.ParameterDict(
            {site.name.replace(".", DOT): nn.Parameter(torch.ones(2, 2)) for site in self.sites}
        )

    def set_adapters(self, adapters: Adapters) -> None:
        """Exchange the adapters, the subject first; what was learned stays, strengths are 1 again.

        Raises:
            GatesError: One does not fit the model, is a DoRA or changes other layers.
        """
        adapters = by_name(adapters)
        refuse_magnitudes(adapters)
        known = {name.replace(DOT, ".") for name in self.factors}
        if unknown := sorted(set(modules_of(adapters)) - known):
            raise GatesError(f"nothing is learned for {listed(unknown)}: train for these, too")
        super().set_adapters(adapters)

    @property
    @torch.no_grad()
    def bundle(self) -> LoraBundle:
        """One static adapter that does the same, strengths included."""
        modules, first = {}, next(iter(self.adapters))
        for module in modules_of(self.adapters):
            found = plain_factors(self.adapters, module)
            own = self.factors[module.replace(".", DOT)][int(len(self.adapters) > 2)].tolist()
            weights = [self.strengths[name] * own[int(name != first)] for name in found]
            modules[module] = stacked(list(found.values()), weights)
        return LoraBundle(next(iter(self.adapters.values())).family, modules)

    def _adapted(self, linear: nn.Linear, site: Placed) -> GatedLoraLinear:
        factors = self.factors[site.name.replace(".", DOT)]
        return KindWeightedLora(linear, self._factors(site), factors)
