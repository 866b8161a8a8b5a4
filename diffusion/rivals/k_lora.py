"""One adapter per layer, chosen by the largest entries of its change and the progress of a run."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from core_gates.adapters import GatedLoraLinear
from core_gates.errors import GatesError
from core_gates.numerics import accumulation_dtype
from diffusion.fusion.protocol import Adapters, by_name, modules_of, plain_factors
from diffusion.lora_file import Factors, LoraBundle
from diffusion.rivals.weighing import Weighing

ROWS = 1024  # outputs at a time for which ΔW is formed


class Entries(NamedTuple):
    """What is known of the absolute entries of a ΔW.

    Attributes:
        top: Sum of the largest.
        total: Sum of all.
        number: How many there are.
    """

    top: float
    total: float
    number: int


class KLora(Weighing):
    """K-LoRA (Ouyang et al., 2025): in each layer, either the content or the style is in force.

    ``S_c`` and ``S_s`` are the sums of the ``r_c r_s`` largest absolute entries of each ΔW. At
    layer call ``t`` of a run of ``T`` calls, the content is taken if::

        S_c / γ > S_s ((α t / T + β) mod α)

    with the ratio γ of the means of ``|ΔW|`` over all layers. A run has as many calls as it has
    steps times adapted layers: ``t`` counts within each forward pass and starts at the step that
    `at` is told, so both passes of classifier-free guidance choose alike.

    The first adapter is the content, the others are styles. The paper compares two; of more styles
    the one with the largest ``S_s`` over its mean ``|ΔW|`` stands for all, and the sums cover as
    many entries as the product of the two largest ranks, which is the same for two. A layer that
    only one adapter changes takes that one. Strengths weigh what is added and do not enter the
    choice; strength 0 takes an adapter out of it.

    Args:
        model: See `diffusion.fusion.GatedFusion`.
        adapters: Name -> adapter, the content first.
        alpha: Period of the schedule.
        beta: Its start.
        gamma: Replaces the ratio of the means of ``|ΔW|``.

    Raises:
        GatesError: An adapter does not fit the model or is a DoRA, or a number is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        adapters: Mapping[str, LoraBundle],
        *,
        alpha: float = 1.5,
        beta: float = 1.275,
        gamma: float | None = None,
    ) -> None:
        if not (0 < alpha < math.inf and 0 <= beta < math.inf):
            raise GatesError(f"alpha {alpha} must be positive and beta {beta} not negative")
        if gamma is not None and not 0 < gamma < math.inf:
            raise GatesError(f"gamma is {gamma}, expected a positive number")
        super().__init__(model, adapters)
        self.alpha, self.beta, self.gamma = alpha, beta, gamma
        self._step, self._steps, self._calls = 0, 1, 0
        self._scores = self._scored(adapters)

    def at(self, step: int, steps: int) -> None:
        """Set the progress of the run."""
        self._step, self._steps = step, steps

    def set_adapters(self, adapters: Adapters) -> None:
        """Exchange the adapters, the content first; strengths are 1 again.

        Raises:
            GatesError: One does not fit the model or is a DoRA; the old ones stay.
        """
        adapters = by_name(adapters)
        scores = self._scored(adapters)
        super().set_adapters(adapters)
        self._scores = scores

    def choice(self, site: str, call: int, calls: int) -> str | None:
        """Return which adapter a layer takes.

        Args:
            site: Name of the layer.
            call: Number t of the layer call.
            calls: Number T of calls of the run.
        """
        on = self.on
        scores = {n: s for n, s in self._scores.get(site, {}).items() if n in on}
        styles = [name for name in scores if name != next(iter(self.adapters))]
        if not styles:
            return next(iter(scores), None)
        style = max(styles, key=scores.__getitem__)
        content = next((name for name in scores if name not in styles), None)
        factor = (self.alpha * call / calls + self.beta) % self.alpha
        takes_content = content is not None and scores[content] > factor * scores[style]
        return content if takes_content else style

    def _scored(self, adapters: Mapping[str, LoraBundle]) -> dict[str, dict[str, float]]:
        """Return S over the mean |ΔW|, whose ratio of two adapters is S_c / (γ S_s)."""
        sums = {module: _entries(adapters, module) for module in modules_of(adapters)}
        means = {}
        for place, name in enumerate(adapters):
            entries = [by_name[name] for by_name in sums.values() if name in by_name]
            means[name] = sum(e.total for e in entries) / max(sum(e.number for e in entries), 1)
            if self.gamma is not None:
                means[name] = self.gamma if place == 0 else 1.0
        return {
            module: {n: e.top / means[n] if means[n] > 0 else 0.0 for n, e in by_name.items()}
            for module, by_name in sums.items()
        }

    def _attach(self) -> None:
        super()._attach()
        self._handles.append(self.model.register_forward_pre_hook(self._begin))
        for site, layer in self.layers.items():
            self._handles.append(layer.register_forward_pre_hook(partial(self._choose, site)))

    def _begin(self, _model: nn.Module, _args: tuple[Any, ...]) -> None:
        self._calls = 0

    def _choose(self, site: str, layer: nn.Module, _args: tuple[Any, ...]) -> None:
        assert isinstance(layer, GatedLoraLinear)
        each = len(self.layers)
        chosen = self.choice(site, self._step * each + self._calls, self._steps * each)
        layer.set_strengths(self._only(chosen))
        self._calls += 1


def _entries(adapters: Mapping[str, LoraBundle], module: str) -> dict[str, Entries]:
    """Return the sums of each adapter that changes a layer."""
    by_name = plain_factors(adapters, module)
    ranks = sorted((factors.rank for factors in by_name.values()), reverse=True)[:2]
    return {name: _sums(factors, math.prod(ranks)) for name, factors in by_name.items()}


@torch.no_grad()
def _sums(factors: Factors, wanted: int) -> Entries:
    """Return the sum of the largest entries of ΔW and of all, which is formed row by row."""
    top, total = torch.empty(0, dtype=torch.float64), 0.0
    dtype = accumulation_dtype(factors.up)
    factors = factors._replace(down=factors.down.to(dtype), up=factors.up.to(dtype))
    for start in range(0, factors.out_features, ROWS):
        rows = factors.rows(start, min(start + ROWS, factors.out_features))
        entries = rows.delta_weight().abs().flatten()
        total += float(entries.double().sum())
        top = torch.cat([top, entries.topk(min(wanted, len(entries))).values.double().cpu()])
        top = top.topk(min(wanted, len(top))).values
    return Entries(float(top.sum()), total, factors.out_features * factors.in_features)
