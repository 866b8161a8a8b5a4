"""Putting adapters next to the linear layers of a model, and taking them off again."""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from core_gates.adapters.gated_lora import GatedLoraLinear
from core_gates.adapters.sparse_lora_linear import SparseLoraLinear

AdaptedLinear = GatedLoraLinear | SparseLoraLinear


def attach_adapters(
    model: nn.Module,
    adapt: Callable[[nn.Linear], AdaptedLinear] = SparseLoraLinear,
    *,
    where: Sequence[str] = ("*",),
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
            shared[id(linear)] = adapt(linear).train(linear.training)
        _put(model, name, shared[id(linear)])
    return {name: shared[id(linear)] for name, linear in chosen.items()}


def detach_adapters(model: nn.Module) -> nn.Module:
    """Put the layers back in place of those that :func:`attach_adapters` made, bit for bit.

    Args:
        model: A model with adapters; what they learned is dropped unless it was merged before.

    Returns:
        The same model.
    """
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if name and isinstance(module, AdaptedLinear):
            _put(model, name, module.base)
    return model


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
