"""Plain adapters, layer by layer, and the one adapter that does what several do together."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from core_gates.errors import GatesError
from core_gates.numerics import accumulation_dtype
from diffusion.lora_file import Factors, LoraBundle

Weight = float | Tensor
"""Factor of the output of an adapter: a number, or one for each output (out_features,)."""


def one_family(adapters: Mapping[str, LoraBundle]) -> str:
    """Return the family of adapters.

    Raises:
        GatesError: There are none, or they are of several.
    """
    families = {bundle.family: name for name, bundle in adapters.items()}
    if len(families) != 1:
        found = ", ".join(f"{name!r} for {family}" for family, name in families.items())
        raise GatesError(
            f"found {found or 'no adapter'}; one adapter is made of those of one family: give them"
        )
    return next(iter(families))


def modules_of(adapters: Mapping[str, LoraBundle]) -> list[str]:
    """Return the layers that an adapter changes, each once, in a fixed order."""
    return sorted({module for bundle in adapters.values() for module in bundle.modules})


def plain_factors(adapters: Mapping[str, LoraBundle], module: str) -> dict[str, Factors]:
    """Return what the adapters that change a layer add to its weight.

    Args:
        adapters: Name -> adapter.
        module: diffusers name of the layer.

    Raises:
        GatesError: One is a DoRA, whose change no factors alone describe, or sizes differ.
    """
    found = {n: b.modules[module] for n, b in adapters.items() if module in b.modules}
    for name, factors in found.items():
        if factors.magnitude is not None:
            raise GatesError(
                f"adapter {name!r} is a DoRA at {module}, and its norms cannot be merged: leave it"
                " out, or convert it to a plain LoRA with a base first"
            )
    sizes = {(f.in_features, f.out_features): name for name, f in found.items()}
    if len(sizes) > 1:
        text = ", ".join(f"{i} to {o} features in {n!r}" for (i, o), n in sizes.items())
        raise GatesError(f"adapters are of unlike models: {module} has {text}")
    return found


def stacked(factors: Sequence[Factors], weights: Sequence[Weight]) -> Factors:
    """Return the weighted sum of the changes of a layer, exactly; ranks add up.

    Args:
        factors: Of each adapter.
        weights: Of each adapter, for all outputs or for each.
    """
    dtype = accumulation_dtype(*(f.up for f in factors))
    ups = []
    for one, weight in zip(factors, weights, strict=True):
        rows = torch.as_tensor(weight, dtype=dtype).reshape(-1, 1).to(one.up.device)
        ups.append(one.scale * rows * one.up.to(dtype))
    return Factors(torch.cat([f.down.to(dtype) for f in factors]), torch.cat(ups, 1))


def weighted_sum(
    adapters: Mapping[str, LoraBundle], weights: Mapping[str, float] | None = None
) -> LoraBundle:
    """Return the adapter that does what all do at once; ranks add up.

    Parts for text encoders are left out.

    Args:
        adapters: Name -> adapter.
        weights: Name -> factor; 1 for all by default.

    Raises:
        GatesError: There is no adapter, or they do not fit each other.
    """
    family, modules = one_family(adapters), {}
    for module in modules_of(adapters):
        found = plain_factors(adapters, module)
        given = [1.0 if weights is None else weights[name] for name in found]
        modules[module] = stacked(list(found.values()), given)
    return LoraBundle(family, modules)
