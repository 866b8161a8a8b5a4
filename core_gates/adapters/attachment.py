"""Putting adapters next to the linear layers of a model, and taking them off again."""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from core_gates.adapters.gated_lora import GatedLoraLinear
from core_gates.adapters.siblings import GatedSiblings, SiblingLinear
from core_gates.adapters.sparse_lora_linear import SparseLoraLinear

AdaptedLinear = GatedLoraLinear | SparseLoraLinear | SiblingLinear


def attach_adapters(
    model: nn.Module,
    adapt: Callable[[nn.Linear], AdaptedLinear] = SparseLoraLinear,
    *,
    where: Sequence[str] = ("*",),
    transparent: bool = False,
) -> dict[str, AdaptedLinear]:
    """Replace linear layers of a model by layers with adapters, in place.

    The layers themselves stay as they are, under the name ``base``; nothing is frozen. The output
    projection of ``nn.MultiheadAttention`` is passed over: its weight is read without a call. So
    are layers that have adapters already.

    Example:
        >>> model.requires_grad_(False)
        >>> attach_adapters(model, partial(SparseLoraLinear, rank=16), where=["*.q_proj"])

    Args:
        model: Any module that holds linear layers.
        adapt: Called with each layer; :class:`SparseLoraLinear` or :class:`GatedLoraLinear`.
        where: Patterns of the names of the layers.
        transparent: Whether the model is saved and loaded as without adapters, under the names of
            the plain layers, such as by ``save_pretrained``; adapters and gates then go by
            themselves. For :class:`GatedLoraLinear`.

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
        and isinstance(module, nn.Linear)
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

    The model is saved and loaded as without them; :func:`detach_adapters` takes them off.

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
    """Put the layers back in place of those that :func:`attach_adapters` made, bit for bit.

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
