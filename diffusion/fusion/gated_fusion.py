"""Several adapters on a model at once, each weighed by a gate in every layer (AutoLoRA, 2025)."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, cast, get_args

import torch
from torch import Tensor, nn

from core_gates.adapters import (
    AdapterCapacity,
    DiffusionTime,
    GatedLoraLinear,
    GatedSiblings,
    LoraGate,
    LowRank,
    OpenGate,
    RelevanceGate,
    SiblingLinear,
    attach_adapters,
    attach_siblings,
    detach_adapters,
    side_by_side,
)
from core_gates.adapters.lora_gate import AdapterContext
from core_gates.adapters.low_rank import AdapterFactors
from core_gates.errors import GatesError, check_option
from diffusion.fusion.gates_file import (
    DOT,
    SWITCH,
    load_gate,
    load_gates,
    mode_of,
    options_of,
    save_gates,
)
from diffusion.fusion.protocol import (
    ROLES,
    TIME_SCALES,
    Adapters,
    Fusion,
    by_name,
    family_of,
    linear_sizes,
    refuse_misfits,
    sites_of,
    uncompiled,
    weighted_sum,
    with_roles,
    with_strengths,
)
from diffusion.fusion.retrieved import Retrieved
from diffusion.lora_file import Factors, LoraBundle, shrink_bundle
from diffusion.lora_file.container import listed
from diffusion.lora_file.family import Placed


def global_lora(adapters: Mapping[str, LoraBundle], rank: int) -> LoraBundle:
    """Return the best approximation of a rank to the mean of all changes, layer by layer.

    The mean ``Σ ΔW_k / K`` has the factors of all adapters side by side; QR decompositions of both
    leave a core of Kr × Kr numbers, whose singular value decomposition gives the approximation
    (Eckart and Young, 1936). No ΔW is formed. An adapter without a layer counts as zero there.

    Args:
        adapters: Name -> adapter.
        rank: That of the result; a layer whose ranks add up to less keeps their sum.

    Raises:
        GatesError: There is no adapter, they do not fit each other, or the rank is below 1.
    """
    if not adapters:
        raise GatesError("there are no adapters to approximate: give at least one")
    mean = weighted_sum(adapters, dict.fromkeys(adapters, 1 / len(adapters)))
    return shrink_bundle(mean, rank)[0]


Mode = Literal["gated", "sum", "strengths", "relevance"]


class GatedFusion(Fusion, nn.Module):
    """Adapters of a model, in force while attached; the model itself never changes.

    Examples:
        >>> adapters = [load_lora("subject.safetensors"), load_lora("style.safetensors")]
        >>> with GatedFusion(pipe.transformer, adapters) as fused:
        ...     fused.set_strengths({"style": 0.8})
        ...     image = pipe(prompt).images[0]

    The gates are the only parameters, and stay from one attachment to the next. Where a family is
    known, layers that published gates see fused share one; saving the model while adapters are
    attached saves the model alone.

    Args:
        model: A ``FluxTransformer2DModel``, ``SD3Transformer2DModel``, or any with linear layers,
            which may be compiled by ``torch.compile`` before or after; it is compiled again where
            adapters change other layers.
        adapters: Name -> adapter, or a list; its adapters are named by their files, see
            `diffusion.fusion.protocol.by_name`.
        mode: ``gated``; ``strengths``: each layer multiplies adapters by its factors, one for each
            role and for two or more of them, whatever the input; ``relevance``: a gate opens each
            retrieved adapter as far as the caption needs it, see `suit`; or ``sum``: the plain sum.
        gates: File of trained gates, see `diffusion.fusion.gates_file.load_gates`; without
            it they begin as the plain sum, or by ``options``. Gates begin at the strengths of a
            file of strengths.
        factors: Multiply adapters by such factors before gates, too.
        switch: Multiply adapters in all layers by how well they suit, see `describe`.
        everywhere: Make a gate for every linear layer in the blocks of the model, to be trained;
            else for the layers that an adapter changes.
        capacity: Memory for adapters that are exchanged later without compiling again.
        options: Further options of `core_gates.adapters.LoraGate`.

    Raises:
        GatesError: An adapter is of another family or does not fit the model, or gates do not.
    """

    roles: dict[str, str]
    scores: dict[str, float]

    def __init__(
        self,
        model: nn.Module,
        adapters: Adapters,
        *,
        mode: Mode = "gated",
        gates: str | Path | None = None,
        factors: bool = False,
        switch: bool = False,
        everywhere: bool = False,
        capacity: AdapterCapacity | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        check_option("mode", mode, get_args(Mode))
        idle = sorted(options.keys() - {"dtype", "device"})
        if mode == "sum":
            given = {"factors": factors, "gates": gates, "switch": switch}
            idle += [name for name, value in given.items() if value]
        if mode != "gated" and idle:
            raise GatesError(f"mode={mode!r} has no gates: leave {', '.join(idle)} out")
        model = uncompiled(model)
        _refuse_attached(model)
        self._model, self.mode, self.capacity, self.everywhere = (
            (model,),
            mode,
            capacity,
            everywhere,
        )
        self.family = family_of(model)
        self._sizes = linear_sizes(model)
        self._sites = sites_of(model, None if mode == "sum" else self.family)
        self._layers: dict[str, GatedLoraLinear] = {}
        self._clock: DiffusionTime | None = None
        self.gates = nn.ModuleDict()
        self.context: AdapterContext | RelevanceGate | None = None
        self._take(adapters)
        if mode != "sum":
            kinds = {"kinds": len(ROLES)} if factors or mode == "strengths" else {}
            kinds |= {"kinds": 1} if mode == "relevance" else {}
            self._make_gates(gates, kinds | options, switch)
            self._weigh()

    @property
    def model(self) -> nn.Module:
        """The model; it is not a part of this module."""
        return self._model[0]

    @property
    def attached(self) -> bool:
        """Whether the adapters are in force."""
        return bool(self._layers)

    @property
    def sites(self) -> list[Placed]:
        """Where the adapters change the model, in its order; all in blocks if wanted everywhere."""
        changed = {module for bundle in self.adapters.values() for module in bundle.modules}
        inside = self.everywhere or self.capacity is not None
        return [
            site
            for site in self._sites
            if changed.intersection(site.parts)
            or (inside and (self.family is None or site.name not in site.parts))
        ]

    @property
    def layers(self) -> Mapping[str, GatedLoraLinear]:
        """Site -> layer with adapters, while attached."""
        return self._layers

    def attach(self) -> Self:
        """Put the adapters in force.

        Raises:
            GatesError: They are, or the model has others.
        """
        _refuse_attached(self.model)
        try:
            self._attach()
        except BaseException:
            detach_adapters(self.model)
            self.detach()
            raise
        return self

    def detach(self) -> None:
        """Leave the model with its own layers, the same objects with the same bits.

        Adapters that something else has attached stay in force.
        """
        if self.attached:
            detach_adapters(self.model)
        self._layers = {}
        if self._clock is not None:
            self._clock.stop()
            self._clock = None

    def set_adapters(self, adapters: Adapters) -> None:
        """Exchange the adapters for others; strengths are 1 again, roles unknown, gates stay.

        Args:
            adapters: As at first; those that change no layer without a gate.

        Raises:
            GatesError: One does not fit the model, or there is no room for it.
        """
        before = self.adapters, self.strengths, self.roles, self.scores
        self._take(adapters)
        served = set(self._layers) or {
            s.name for s in self._sites if self.mode == "sum" or _key(s.name) in self.gates
        }
        try:
            if lacking := [site.name for site in self.sites if site.name not in served]:
                raise GatesError(
                    f"the new adapters change {listed(lacking)}, which had none when this was"
                    f" {'attached: detach first, or' if self.attached else 'made:'} make it with"
                    " everywhere=True"
                )
            fitting = {s.name: self._fitting(s) for s in self._sites if s.name in self._layers}
        except GatesError:
            self.adapters, self.strengths, self.roles, self.scores = before
            raise
        for name, factors in fitting.items():
            self._layers[name].set_adapters(factors)
        if isinstance(self.context, RelevanceGate):
            self.context.set_openness(None)
        self._weigh()

    def set_strengths(self, strengths: Mapping[str, float]) -> None:
        """Weigh adapters before the gates see them; others keep their strength, 0 is off.

        Raises:
            GatesError: There is no adapter of a name, or a strength is not finite.
        """
        self.strengths = with_strengths(self.strengths, strengths)
        self._weigh()

    def suit(self, found: Retrieved | None) -> None:
        """Open adapters as far as captions need them, until they are exchanged.

        Args:
            found: What is known of the adapters, for each sample of a batch or one for all; None
                opens all as in a sum.

        Raises:
            GatesError: The mode is not ``relevance``, others were retrieved, or the gate was
                trained for another encoder.
        """
        gate = self.context
        if not isinstance(gate, RelevanceGate):
            raise GatesError(f"mode={self.mode!r} opens no adapters: give mode='relevance'")
        if found is None:
            gate.set_openness(None)
            return
        if found.names != tuple(self.adapters):
            raise GatesError(
                f"{listed([*found.names])} were retrieved, but the adapters are"
                f" {listed([*self.adapters])}: set those that were retrieved, in their order"
            )
        if gate.fingerprint not in ("", found.encoder):
            raise GatesError(
                f"the gate was trained for the encoder {gate.fingerprint}, found"
                f" {found.encoder or 'an unknown one'}: index the library with that encoder"
            )
        gate.set_openness(gate.openness(found.cosines, found.similarities))

    def describe(
        self,
        *,
        roles: Mapping[str, str] | None = None,
        scores: Mapping[str, float] | None = None,
    ) -> None:
        """Set roles of adapters and their scores for the prompt; others keep what they have.

        Args:
            roles: Name -> ``subject``, ``style`` or ``any``, which factors depend on.
            scores: Name -> score, such as the cosine of the adapter with the prompt, which the
                switch depends on; an adapter without one stays on.

        Raises:
            GatesError: There is no adapter of a name, no such role, or a score is not finite.
        """
        self.roles = with_roles(self.roles, roles or {})
        unknown = dict.fromkeys(self.adapters, 0.0)
        changed = with_strengths(unknown, scores or {})
        self.scores |= {name: changed[name] for name in scores or {}}
        self._weigh()

    def weights(self, site: str) -> dict[str, float]:
        """Return name -> what the output of an adapter at a site is multiplied by before gates."""
        factors = getattr(self.gate(site), "factors", None)
        if not isinstance(self.context, AdapterContext) or factors is None:
            return dict(self.strengths)
        learned = self.context.weights(factors.detach()).tolist()
        return {n: c * s for (n, s), c in zip(self.strengths.items(), learned, strict=False)}

    def save_gates(self, path: str | Path) -> Path:
        """Write the gates, in the names of DiffSynth-Studio."""
        return save_gates(path, self.gate_states())

    def gate_states(self) -> dict[str, dict[str, Tensor]]:
        """Return site -> parameters of its gate."""
        states = {name.replace(DOT, "."): gate.state_dict() for name, gate in self.gates.items()}
        if self.context is not None and self.context.state_dict():
            states[SWITCH] = self.context.state_dict()
        return states

    def gate(self, site: str) -> LoraGate | OpenGate:
        """Return the gate of a site, by its name."""
        if self.mode == "sum":
            return OpenGate(next(s.out_features for s in self._sites if s.name == site))
        return cast(LoraGate | OpenGate, self.gates[_key(site)])

    def _weights(self) -> Sequence[float]:
        """Return the factor of each adapter, in order."""
        return list(self.strengths.values())

    def _weigh(self) -> None:
        if isinstance(self.context, AdapterContext):
            roles = [ROLES.index(self.roles[name]) for name in self.adapters]
            self.context.describe(roles, [self.scores.get(name) for name in self.adapters])
        for layer in self._layers.values():
            layer.set_strengths(self._weights())

    def _take(self, adapters: Adapters) -> None:
        given = by_name(adapters)
        refuse_misfits(given, self.family, self._sizes)
        self.adapters, self.strengths = given, dict.fromkeys(given, 1.0)
        self.roles, self.scores = dict.fromkeys(given, ROLES[0]), {}

    def _make_gates(self, path: str | Path | None, options: dict[str, Any], switch: bool) -> None:
        sites = {site.name: site for site in self.sites}
        state: dict[str, dict[str, Tensor]] = {}
        switched = None
        if path is not None:
            state = load_gates(path, [site.name for site in self._sites])
            if "relevance" in {self.mode, made_for := mode_of(state)} and made_for != self.mode:
                raise GatesError(f"{path} is for mode={made_for!r}, not {self.mode!r}: give that")
            switched = state.pop(SWITCH, None)
            saved = options_of(next(iter(state.values())))
            if self.mode != "gated" and "variant" in saved:
                raise GatesError(f"{path} holds gates, not strengths alone: give mode='gated'")
            for option in saved.keys() & options.keys():
                if options[option] != saved[option]:
                    raise GatesError(
                        f"{path} holds gates with {option}={saved[option]!r}, not"
                        f" {options[option]!r}: leave {option} out"
                    )
            options = options | saved
            if lacking := [name for name in sites if name not in state]:
                raise GatesError(f"{path} holds no gates for {listed(lacking)}: give others")
            sites = {site.name: site for site in self._sites if site.name in state}
        devices = {name: p.device for name, p in self.model.named_parameters()}
        for name, site in sites.items():
            device = devices.get(f"{site.parts[0]}.weight")
            make = LoraGate if self.mode == "gated" else OpenGate
            gate = make(site.out_features, device=device, **options)
            if name in state:
                load_gate(gate, state[name], name)
            self.gates[_key(name)] = gate
        if self.mode == "relevance":
            self.context = RelevanceGate()
        elif (kinds := options.get("kinds", 0)) or switch or switched:
            most = 0 if self.capacity is None else self.capacity.adapters
            self.context = AdapterContext(kinds, switch=switch or bool(switched), most=most)
        if self.context is not None and (switched or (state and self.mode == "relevance")):
            load_gate(self.context, switched or {}, "the adapters")

    def _factors(self, site: Placed) -> list[LowRank]:
        """Return what each adapter does at a site, in order; rank 0 where it does nothing."""
        joined = []
        for bundle in self.adapters.values():
            parts = [bundle.modules.get(part) for part in site.parts]
            if not any(part is not None for part in parts):
                joined.append(
                    LowRank(torch.empty(0, site.in_features), torch.empty(site.out_features, 0))
                )
            else:
                joined.append(side_by_side([_low_rank(part) for part in parts], site.sizes))
        return joined

    def _attach(self) -> None:
        if self.mode == "gated" and any(
            getattr(gate, "time", None) == "film" for gate in self.gates.values()
        ):
            self._clock = DiffusionTime(self.model, scale=TIME_SCALES.get(self.family or "", 1.0))
        alone: dict[int, Placed] = {}
        for site in self.sites:
            if len(site.parts) == 1:
                alone[id(self.model.get_submodule(site.parts[0]))] = site
            else:
                self._layers[site.name] = self._attach_siblings(site)
        if alone:
            attached = attach_adapters(
                self.model,
                lambda linear: self._adapted(linear, alone[id(linear)]),
                where=[site.parts[0] for site in alone.values()],
                transparent=True,
            )
            sites = {site.parts[0]: site.name for site in alone.values()}
            for name, layer in attached.items():
                assert isinstance(layer, GatedLoraLinear)
                self._layers[sites[name]] = layer
        for layer in self._layers.values():
            layer.clock, layer.context = self._clock, self.context
        self._weigh()

    def _attach_siblings(self, site: Placed) -> GatedSiblings:
        factors, gate, capacity = self._factors(site), self.gate(site.name), self._capacity(site)
        adapt = partial(GatedSiblings, adapters=factors, gate=gate, capacity=capacity)
        return attach_siblings(self.model, site.parts, adapt)

    def _adapted(self, linear: nn.Linear, site: Placed) -> GatedLoraLinear:
        gate = self.gate(site.name)
        return GatedLoraLinear(linear, self._factors(site), gate=gate, capacity=self.capacity)

    def _capacity(self, site: Placed) -> AdapterCapacity | None:
        """Return the capacity at a site, where the ranks of its parts add up."""
        return self.capacity and AdapterCapacity(
            self.capacity.adapters, self.capacity.rank * len(site.parts)
        )

    def _fitting(self, site: Placed) -> list[LowRank]:
        """Return what each adapter does at a site, where there is room for it."""
        factors, capacity, parts = self._factors(site), self._capacity(site), len(site.parts)
        given = [factor.rank for factor in factors if factor.rank]
        if capacity and (len(given) > capacity.adapters or max(given, default=0) > capacity.rank):
            raise GatesError(
                f"there is room for {capacity.adapters} adapters of rank {capacity.rank // parts},"
                f" found {len(factors)} of ranks up to {max(given) // parts} at {site.name}: make"
                " it with a larger capacity"
            )
        return factors


def _key(site: str) -> str:
    return site.replace(".", DOT)


def _refuse_attached(model: nn.Module) -> None:
    linear_sizes(model)  # refuses adapters of PEFT
    for name, module in model.named_modules():
        if isinstance(module, AdapterFactors | SiblingLinear):
            raise GatesError(f"{name} has adapters already: detach them before others are attached")


def _low_rank(factors: Factors | None) -> LowRank | None:
    """Return the factors of a layer.

    Raises:
        GatesError: They change norms of columns, which no output of the layer shows.
    """
    if factors is None:
        return None
    magnitude = factors.magnitude
    if magnitude is not None and magnitude.shape[1] != 1:
        raise GatesError("a DoRA adapter with norms of columns cannot be fused: leave it out")
    return LowRank(
        factors.down,
        factors.up,
        factors.scale,
        None if magnitude is None else magnitude.squeeze(1),
    )
