"""Two adapters with a learned factor for every column of their changes (ZipLoRA)."""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core_gates.adapters import GatedLoraLinear, LowRank, OpenGate
from core_gates.errors import GatesError
from diffusion.fusion.gates_file import DOT
from diffusion.fusion.protocol import Adapters, by_name, modules_of, plain_factors, stacked
from diffusion.lora_file import Factors, LoraBundle
from diffusion.lora_file.family import Placed
from diffusion.rivals.weighing import Weighing
from diffusion.rivals.x_lora import owners, refuse_magnitudes


class ColumnWeightedLora(GatedLoraLinear):
    """Add the outputs of adapters, whose inputs are weighed by feature.

    Args:
        base: The layer.
        adapters: Its adapters, in order; rank 0 where one does nothing.
        columns: Factors of the inputs of each adapter (K, D), which stay outside of this module.
    """

    owners: Tensor

    def __init__(self, base: nn.Module, adapters: Sequence[LowRank], columns: Tensor) -> None:
        super().__init__(base, adapters, gate=OpenGate(cast(int, base.out_features)))
        self._columns = (columns,)

    def set_adapters(self, adapters: Sequence[LowRank]) -> None:
        """Exchange the adapters.

        Raises:
            ValueError: The factors of one do not fit the layer.
        """
        super().set_adapters(adapters)
        self.owners = owners([adapter.rank for adapter in adapters])

    def _hidden(self, x: Tensor, ranks: Sequence[int]) -> Tensor:
        columns = self._columns[0][self.owners].to(x.device, x.dtype)
        strengths = self.strengths.to(x.device, x.dtype)[owners(ranks)]
        return F.linear(x, self.down.to(x.device, x.dtype) * columns) * strengths


class ZipLora(Weighing):
    """ZipLoRA (Shah et al., 2023): weigh the columns of both ΔW so that they do not interfere.

    In every layer ``ΔW = ΔW_1 diag(m_1) + ΔW_2 diag(m_2)`` with vectors ``m`` over the inputs, 1 at
    the start. The paper trains them to reproduce what each adapter predicts alone for its own
    prompt, plus ``λ`` times :meth:`penalty`, as
    :func:`diffusion.experiments.trained_gates.distill` does. They are learned for one pair, which
    it has to see.

    Args:
        model: See :class:`diffusion.fusion.GatedFusion`.
        adapters: Name -> adapter, two of them, no DoRA.

    Raises:
        GatesError: There are not two adapters, or one does not fit the model.
    """

    penalty_weight = 0.01
    """λ of the paper."""

    def __init__(self, model: nn.Module, adapters: Mapping[str, LoraBundle]) -> None:
        _refuse_others(adapters)
        super().__init__(model, adapters)
        refuse_magnitudes(adapters)
        self.columns = nn.ParameterDict(
            {
                site.name.replace(".", DOT): nn.Parameter(torch.ones(2, site.in_features))
                for site in self.sites
            }
        )

    def set_adapters(self, adapters: Adapters) -> None:
        """Exchange the two adapters; what was learned stays, strengths are 1 again.

        Raises:
            GatesError: There are not two, or one does not fit the model or changes other layers.
        """
        adapters = by_name(adapters)
        _refuse_others(adapters)
        for module in modules_of(adapters):
            plain_factors(adapters, module)
            if module.replace(".", DOT) not in self.columns:
                raise GatesError(f"nothing is learned for {module}: make another for these two")
        super().set_adapters(adapters)

    def penalty(self) -> Tensor:
        """Return the sum of ``|cos(m_1, m_2)|`` over the layers that both adapters change.

        The paper writes the dot product of the vectors and calls it their cosine similarity; unlike
        that, the cosine does not fall when both vectors shrink.
        """
        shared = set.intersection(*(set(bundle.modules) for bundle in self.adapters.values()))
        vectors = [self.columns[module.replace(".", DOT)] for module in sorted(shared)]
        if not vectors:
            return torch.zeros(())
        cosines = [F.cosine_similarity(pair[0], pair[1], dim=0).abs() for pair in vectors]
        return torch.stack(cosines).sum()

    @property
    @torch.no_grad()
    def bundle(self) -> LoraBundle:
        """One static adapter that does the same, strengths included."""
        modules = {}
        for module in modules_of(self.adapters):
            found = plain_factors(self.adapters, module)
            columns = dict(zip(self.adapters, self.columns[module.replace(".", DOT)], strict=True))
            parts = [
                Factors(one.down * columns[name].cpu().to(one.down.dtype), one.up, one.scale)
                for name, one in found.items()
            ]
            modules[module] = stacked(parts, [self.strengths[name] for name in found])
        return LoraBundle(next(iter(self.adapters.values())).family, modules)

    def _adapted(self, linear: nn.Linear, site: Placed) -> GatedLoraLinear:
        columns = self.columns[site.name.replace(".", DOT)]
        return ColumnWeightedLora(linear, self._factors(site), columns)


def _refuse_others(adapters: Mapping[str, LoraBundle]) -> None:
    if len(adapters) != 2:
        raise GatesError(f"ZipLoRA is for two adapters, found {len(adapters)}: give two")
