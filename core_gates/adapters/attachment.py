"""Gated adapters attached to the layers of a model, siblings under one gate, and detached."""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from core_gates.adapters.gated_lora import GatedLoraLinear
from core_gates.adapters.lora_gate import LoraGate, OpenGate
from core_gates.adapters.low_rank import LowRank, is_unwatched, weight_of
from core_gates.adapters.sparse_low_rank import SparseLoraLinear


class FusedLinears(nn.Module):
    """Layers of one input, their outputs side by side.

    Args:
        layers: At least two modules from (..., D) to (..., D_i) with ``in_features`` and
            ``out_features``.

    Shape:
        ``x`` (..., D) to (..., Σ D_i).

    Raises:
        ValueError: There are fewer, or they have unlike inputs.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        inputs = [int(layer.in_features) for layer in layers]  # type: ignore[arg-type]
        if len(layers) < 2 or len(set(inputs)) > 1:
            raise ValueError(
                f"siblings are at least two layers of one input, found inputs {inputs}"
            )
        self.layers = tuple(layers)  # held by those that stand in their places, not here
        self.sizes = [int(layer.out_features) for layer in layers]  # type: ignore[arg-type]
        self.in_features, self.out_features = inputs[0], sum(self.sizes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of all layers."""
        if self._in_place(x):
            return self._written(x)
        return torch.cat([layer(x) for layer in self.layers], -1)

    def _in_place(self, x: Tensor) -> bool:
        """Return whether the layers may write into one tensor, unseen by anything else."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not x.is_cpu:
            return False
        if torch.is_autocast_enabled("cpu") or torch.jit.is_tracing():  # type: ignore[no-untyped-call]
            return False
        return (
            type(x) is Tensor
            and all(
                is_unwatched(layer)
                and not layer._forward_pre_hooks
                and type(layer.weight) is nn.Parameter
                and layer.weight.dtype == x.dtype
                and layer.bias is not None
                for layer in self.layers
            )
            and not nn.modules.module._global_forward_pre_hooks
        )

    def _written(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        out = x.new_empty(len(rows), self.out_features)
        for layer, part in zip(self.layers, torch.split(out, self.sizes, -1), strict=True):
            bias, weight = cast(Tensor, layer.bias), cast(Tensor, layer.weight)
            torch.addmm(bias, rows, weight.mT, out=part)
        return out.view(*x.shape[:-1], self.out_features)


class GatedSiblings(GatedLoraLinear):
    """Adapters of `FusedLinears`, whose outputs are taken one by one.

    The first layer that is called with an input computes those of all, the others take theirs.

    Args:
        layers: The layers.
        adapters: Adapters of their outputs side by side, see
            `core_gates.adapters.low_rank.side_by_side`.
        gate: Their gate, of all outputs.
        options: As of `GatedLoraLinear`.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        adapters: Sequence[LowRank] = (),
        *,
        gate: LoraGate | OpenGate | None = None,
        **options: Any,
    ) -> None:
        super().__init__(FusedLinears(layers), adapters, gate=gate, **options)
        self._input: Tensor | None = None
        self._left: dict[int, Tensor] = {}
        self._state: tuple[Any, ...] = ()

    @property
    def _fused(self) -> FusedLinears:
        return cast(FusedLinears, self.base)

    def part(self, x: Tensor, place: int) -> Tensor:
        """Return the mixed output of one of the layers (..., D_place) for an input (..., D)."""
        state = self._what_decides(x)
        if self._input is not x or place not in self._left or state != self._state:
            outputs = self(x).split(self._fused.sizes, -1)
            self._input, self._left, self._state = x, dict(enumerate(outputs)), state
        loaded = self._left.pop(place).contiguous()
        if not self._left:
            self._input = None
        return loaded

    def _dense_weight(self) -> Tensor:
        return torch.cat([weight_of(layer) for layer in self._fused.layers])

    def _may_overwrite(self) -> bool:
        return not torch.is_grad_enabled()  # nothing else sees the outputs side by side

    @property
    def _device(self) -> torch.device | None:
        some = next((p for layer in self._fused.layers for p in layer.parameters()), None)
        return None if some is None else some.device

    def _what_decides(self, x: Tensor) -> tuple[Any, ...]:
        """Return what changes when the outputs for the same input would."""
        if torch.compiler.is_compiling() or x.is_inference():
            return ()
        modules = [m for m in (self.gate, *self.gate.children(), self.context) if m is not None]
        parameters = [p for m in modules for p in m._parameters.values()]
        tensors = [x, *(p for p in parameters if p is not None), self.up, self.down, self.strengths]
        versions = [None if t.is_inference() else t._version for t in tensors]
        context_version = None if self.context is None else self.context.version
        return (
            torch.is_grad_enabled(),
            id(self.up),
            id(self._time(None)),
            context_version,
            *versions,
        )


class SiblingLinear(nn.Module):
    """One of the layers of `GatedSiblings` in place of the layer itself.

    It is saved and loaded as the layer alone. The first one holds what they share.

    Args:
        base: The layer.
        siblings: The adapters of all.
        place: Which of the layers it is.
    """

    def __init__(self, base: nn.Module, siblings: GatedSiblings, place: int) -> None:
        super().__init__()
        self.base, self.place = base, place
        self.siblings = siblings if place == 0 else None
        self._shared = (siblings,)

    @property
    def in_features(self) -> int:
        """Inputs of the layer."""
        return int(self.base.in_features)  # type: ignore[arg-type]

    @property
    def out_features(self) -> int:
        """Outputs of the layer."""
        return int(self.base.out_features)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Return the mixed output of this layer."""
        return self._shared[0].part(x, self.place)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the state of the layer."""
        state: dict[str, Any] = self.base.state_dict(*args, **kwargs)
        return state

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **options: Any
    ) -> None:
        for name in [name for name in state_dict if name.startswith(prefix)]:
            state_dict[f"{prefix}base.{name.removeprefix(prefix)}"] = state_dict.pop(name)
        if self.siblings is not None:
            for name, tensor in self.siblings.state_dict().items():
                state_dict[f"{prefix}siblings.{name}"] = tensor
        super()._load_from_state_dict(state_dict, prefix, *rest, **options)  # type: ignore[no-untyped-call]


AdaptedLinear = GatedLoraLinear | SparseLoraLinear | SiblingLinear


def attach_adapters(
    model: nn.Module,
    adapt: Callable[[Any], AdaptedLinear] = SparseLoraLinear,
    *,
    where: Sequence[str] = ("*",),
    kinds: tuple[type[nn.Module], ...] = (nn.Linear,),
    transparent: bool = False,
) -> dict[str, AdaptedLinear]:
    """Replace linear layers of a model by layers with adapters, in place.

    The layers themselves stay as they are, under the name ``base``; nothing is frozen. The output
    projection of ``nn.MultiheadAttention`` is passed over: its weight is read without a call. So
    are layers that have adapters already.

    Examples:
        >>> model.requires_grad_(False)
        >>> attach_adapters(model, partial(SparseLoraLinear, rank=16), where=["*.q_proj"])

    Args:
        model: Any module that holds linear layers.
        adapt: Called with each layer; `SparseLoraLinear` or `GatedLoraLinear`.
        where: Patterns of the names of the layers.
        kinds: Classes of the layers, such as also ``Conv1D`` of transformers.
        transparent: Whether the model is saved and loaded as without adapters, under the names of
            the plain layers, such as by ``save_pretrained``; adapters and gates then go by
            themselves. For `GatedLoraLinear`.

    Returns:
        Name of each layer -> its replacement.

    Raises:
        ValueError: No layer matches.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    taken = [f"{name}." for name, module in modules.items() if isinstance(module, AdaptedLinear)]
    linears = {
        name: module
        for name, module in modules.items()
        if name
        and isinstance(module, kinds)
        and not isinstance(module, NonDynamicallyQuantizableLinear)
        and not any(name.startswith(prefix) for prefix in taken)
    }
    chosen = {n: m for n, m in linears.items() if any(fnmatchcase(n, p) for p in where)}
    if not chosen:
        raise ValueError(
            f"no linear layer of {type(model).__name__} matches {list(where)}; it offers"
            f" {', '.join(linears) or 'none that a name leads to'}"
        )
    shared: dict[int, AdaptedLinear] = {}  # a layer that occurs twice
    for name, linear in chosen.items():
        if id(linear) not in shared:
            adapted = adapt(linear).train(linear.training)
            if isinstance(adapted, GatedLoraLinear):
                adapted.transparent = transparent
            shared[id(linear)] = adapted
        _put(model, name, shared[id(linear)])
    return {name: shared[id(linear)] for name, linear in chosen.items()}


def attach_siblings(
    model: nn.Module,
    names: Sequence[str],
    adapt: Callable[[Sequence[nn.Module]], GatedSiblings] = GatedSiblings,
) -> GatedSiblings:
    """Replace layers of one input by layers whose adapters share a gate, in place.

    The model is saved and loaded as without them; `detach_adapters` takes them off.

    Args:
        model: Any module that holds the layers.
        names: Names of the layers, in the order of the outputs of the gate.
        adapt: Called with the layers.

    Returns:
        What the layers share.

    Raises:
        ValueError: The layers have unlike inputs, there are fewer than two, one occurs twice, or
            one has adapters already.
    """
    layers = [model.get_submodule(name) for name in names]
    if len({id(layer) for layer in layers}) < len(layers):
        raise ValueError(f"siblings {list(names)} must be different layers")
    for name, layer in zip(names, layers, strict=True):
        if isinstance(layer, AdaptedLinear):
            raise ValueError(f"{name} has adapters already: detach them first")
    shared = adapt(layers).train(layers[0].training)
    for place, (name, layer) in enumerate(zip(names, layers, strict=True)):
        _put(model, name, SiblingLinear(layer, shared, place).train(layer.training))
    return shared


def detach_adapters(model: nn.Module) -> nn.Module:
    """Put the layers back in place of those that `attach_adapters` made, bit for bit.

    Args:
        model: A model with adapters; what they learned is dropped unless it was merged before.

    Returns:
        The same model.
    """
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if name and isinstance(module, AdaptedLinear) and not isinstance(module, GatedSiblings):
            _put(model, name, module.base)
    return model


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
