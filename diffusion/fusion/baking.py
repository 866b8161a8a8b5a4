"""Hooks on the layers of a fusion, mean gates of a run, and gates folded into a static adapter."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from core_gates.adapters import GatedLoraLinear, LoraGate
from core_gates.adapters.lora_gate import AdapterContext
from core_gates.errors import GatesError
from diffusion.fusion.gated_fusion import GatedFusion
from diffusion.fusion.gates_file import DOT, PREFIX, load_trained
from diffusion.fusion.protocol import ROLES, modules_of, one_family, plain_factors, stacked
from diffusion.lora_file import Factors, LoraBundle
from diffusion.lora_file.bundle import layers_of


class Observer:
    """See the calls of some layers of an attached fusion; what the model returns stays as it is.

    A subclass says what `see` does with them.

    Args:
        fusion: A fusion, which has to be attached before this is entered.

    Attributes:
        held: Site -> names of the adapters that change it, in order; sites without any are absent.
    """

    def __init__(self, fusion: GatedFusion) -> None:
        self.fusion, self.held = fusion, _held(fusion)
        self._handles: list[RemovableHandle] = []

    def see(self, site: str, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Take up a call of a layer.

        Args:
            site: Its name.
            layer: The layer with its adapters.
            args: Of the call.
            output: Of the call.
        """
        raise NotImplementedError

    def __enter__(self) -> Self:
        """Begin to observe; what was seen before still counts.

        Raises:
            GatesError: The fusion is not attached.
        """
        if not self.fusion.attached:
            raise GatesError("the fusion is not attached, so there are no gates: attach it first")
        self.held = _held(self.fusion)
        for site in self.held:
            hook = partial(self.see, site)
            self._handles.append(self.fusion.layers[site].register_forward_hook(hook))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop observing."""
        while self._handles:
            self._handles.pop().remove()


def _held(fusion: GatedFusion) -> dict[str, list[str]]:
    by_site = {
        site.name: [
            name
            for name, bundle in fusion.adapters.items()
            if any(part in bundle.modules for part in site.parts)
        ]
        for site in fusion.sites
    }
    return {site: names for site, names in by_site.items() if names}


TOKENS = 64  # tokens of a call whose gates are computed


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
        means = self.means.nanmean((0, 1)).tolist() if self.means.numel() else []
        return dict(zip(self.adapters, means, strict=False))


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
        for (step, site), values in self._seen.items():
            held = [names.index(name) for name in self.held[site]]
            means[step, sites.index(site), held] = torch.stack(values).mean(0)
        return GateMap(sites, names, means)


def records_of(gates: GateMap) -> Mapping[str, Any]:
    """Return a gate map as plain values: for each adapter its mean, by layer and by step."""
    records = {}
    for place, name in enumerate(gates.adapters):
        means = gates.means[:, :, place]
        records[name] = {
            "mean": float(means.nanmean()),
            "by_layer": dict(zip(gates.sites, means.nanmean(0).tolist(), strict=True)),
            "by_step": means.nanmean(1).tolist(),
        }
    return records


BLOCK = 256  # tokens at a time for which gates are computed in full

Means = Mapping[str, Mapping[str, Tensor]]
"""Site -> name of an adapter -> mean gate of each output (D,)."""


class MeanGates(Observer):
    """Observe the gates of a fusion while the model runs, each token of each call alike.

    The gates of all adapters exist for a block of tokens at a time. The base output is computed a
    second time for it, so observing is slow; detach it when enough is seen.

    Examples:
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
        x, count = args[0], len(self.held[site])
        for part, time in self._blocks(layer, x):
            gates = layer.gate_values(part, time=time)[..., :count, :]
            total = gates.double().flatten(0, -3).sum(0)
            self._sums[site] = self._sums[site] + total if site in self._sums else total
        self._counts[site] = self._counts.get(site, 0) + x[..., 0].numel()

    def _blocks(self, layer: GatedLoraLinear, x: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Return some tokens of one sample after another, with their time."""
        time = None if layer.clock is None else layer.clock.time
        for index, sample in enumerate(x.unsqueeze(0) if x.ndim == 1 else x):
            moment = time if time is None or time.numel() == 1 else time[index : index + 1]
            for part in sample.reshape(-1, x.shape[-1]).split(self._block):
                yield part.unsqueeze(0), moment


def bake(fusion: GatedFusion, means: Means | None = None) -> LoraBundle:
    """Return one static adapter that does what the gates do on average.

    The rows of B of each adapter are multiplied by its strength and factor, its mean gate and the
    output weight of the gate, and the adapters put side by side, so ranks add up. It is exact where
    gates do not depend on the input. Parts for text encoders are left out.

    Args:
        fusion: Adapters with their strengths and gates, attached or not.
        means: Mean gates, see `MeanGates`; strengths by layer and sums need none.

    Raises:
        GatesError: No mean is known where an adapter changes a layer, or one is a DoRA.
    """
    modules, held = dict[str, Factors](), _held(fusion)
    if means is None:
        means = {
            site.name: dict.fromkeys(fusion.adapters, torch.ones(site.out_features))
            for site in (fusion.sites if fusion.mode in ("sum", "strengths") else ())
        }
    for site in fusion.sites:
        gate, start, rows = fusion.gate(site.name), 0, {}
        for name in held.get(site.name, ()):
            mean = means.get(site.name, {}).get(name)
            if mean is None or mean.shape != (site.out_features,):
                what = "no mean gates" if mean is None else f"{mean.numel()} mean gates"
                raise GatesError(
                    f"{what} of adapter {name!r} at {site.name} are known, expected"
                    f" {site.out_features}: observe a run with these adapters"
                )
            rows[name] = mean.detach().double().cpu()
        for part, size in zip(site.parts, site.sizes, strict=True):
            by_name = plain_factors(fusion.adapters, part)
            on = [name for name in by_name if fusion.strengths[name] != 0]
            factors = fusion.weights(site.name)
            weights = [factors[name] * rows[name][start : start + size] for name in on]
            if isinstance(gate, LoraGate):
                out = gate.weight_out.detach().double().cpu()[start : start + size]
                weights = [weight * out for weight in weights]
            if on:
                modules[part] = stacked([by_name[name] for name in on], weights)
            start += size
    return LoraBundle(fusion.family or one_family(fusion.adapters), modules)


def depends_on_roles(gates: Path) -> bool:
    """Return whether factors of a file differ between roles.

    Raises:
        GatesError: It is missing or damaged.
    """
    return any(
        bool(tensor[:, 1:].any())
        for name, tensor in load_trained(gates).items()
        if name.endswith(".factors")
    )


def strengthened(
    adapters: Mapping[str, LoraBundle],
    gates: Path,
    *,
    strengths: Mapping[str, float],
    roles: Mapping[str, str],
) -> LoraBundle:
    """Return `bake` of the strengths of a file, for which no model is needed.

    Args:
        adapters: Name -> adapter.
        gates: File of trained strengths.
        strengths: Name -> factor of all that an adapter does.
        roles: Name -> one of `diffusion.fusion.protocol.ROLES`.

    Raises:
        GatesError: The file is damaged, or holds gates, or no strengths of a layer; or adapters do
            not fit each other, or one is a DoRA.
    """
    learned, modules = load_trained(gates), {}
    changed = {name: f for bundle in adapters.values() for name, f in bundle.modules.items()}
    whole, context = LoraBundle(one_family(adapters), changed), AdapterContext(len(ROLES))
    sites = {part: site.name for site in layers_of(whole) for part in site.parts}
    context.describe([ROLES.index(roles[name]) for name in adapters])
    for module in modules_of(adapters):
        site = PREFIX + sites.get(module, module).replace(".", DOT)
        if f"{site}.factors" not in learned or f"{site}.bias" in learned:
            raise GatesError(
                f"{gates} holds no strengths of {module} alone: give a file of `train-gates --what"
                " strengths`"
            )
        learned_factors = context.weights(learned[f"{site}.factors"].float()).tolist()
        factors, by_name = (
            dict(zip(adapters, learned_factors, strict=True)),
            plain_factors(adapters, module),
        )
        modules[module] = stacked(
            list(by_name.values()), [strengths[name] * factors[name] for name in by_name]
        )
    return LoraBundle(whole.family, modules)
