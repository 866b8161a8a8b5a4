"""Where a model takes adapters: at its linear layers, some of which published gates see fused."""

from collections.abc import Mapping

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from core_gates.errors import GatesError
from diffusion.lora_file import LoraBundle
from diffusion.lora_file.family import FAMILIES, Placed
from diffusion.lora_file.family.layers import index_of, place

KINDS = {"FluxTransformer2DModel": "flux", "SD3Transformer2DModel": "sd3"}
"""Class of a model of diffusers -> its family."""

TIME_SCALES = {"flux": 1000.0, "sd3": 1.0}
"""Times of gates, from 0 to 1000, by those that models of a family are called with."""


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the model that ``torch.compile`` was given, whose layers the compiled one shares."""
    found = getattr(model, "_orig_mod", model)
    return found if isinstance(found, nn.Module) else model


def family_of(model: nn.Module) -> str | None:
    """Return the family of a model; None for any other, whose layers have a gate each."""
    return next((KINDS[c.__name__] for c in type(model).__mro__ if c.__name__ in KINDS), None)


def linear_sizes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the inputs and outputs of every linear layer of a model, by name."""
    return {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if name
        and isinstance(module, nn.Linear)
        and not isinstance(module, NonDynamicallyQuantizableLinear)
    }


def sites_of(model: nn.Module, family: str | None) -> list[Placed]:
    """Return where a gate belongs, in the order of the published encoder, then the other layers.

    Args:
        model: The model, without adapters.
        family: ``flux``, ``sd3``, or None: every layer is alone.
    """
    sizes = linear_sizes(model)
    fused = [] if family is None else place(FAMILIES[family], _blocks(family, sizes), sizes)
    taken = {part for site in fused for part in site.parts}
    alone = [
        Placed(name, name, (name,), inputs, (outputs,))
        for name, (inputs, outputs) in sizes.items()
        if name not in taken
    ]
    return [*fused, *alone]


def refuse_misfits(
    adapters: Mapping[str, LoraBundle], family: str | None, sizes: Mapping[str, tuple[int, int]]
) -> None:
    """Refuse adapters of other models.

    Args:
        adapters: Name -> adapter.
        family: That of the model, None for any.
        sizes: Inputs and outputs of its linear layers.

    Raises:
        GatesError: An adapter is of another family, or has a layer that the model lacks.
    """
    for name, bundle in adapters.items():
        if family is not None and bundle.family != family:
            raise GatesError(f"adapter {name!r} is for {bundle.family}, the model is {family}")
        for module, found in bundle.sizes().items():
            if sizes.get(module) != (found.in_features, found.out_features):
                has = sizes.get(module)
                raise GatesError(
                    f"adapter {name!r} changes {module} of {found.in_features} to"
                    f" {found.out_features} features, the model has"
                    f" {'none' if has is None else f'{has[0]} to {has[1]}'}"
                )


def _blocks(family: str, sizes: dict[str, tuple[int, int]]) -> dict[str, int]:
    """Return the number of blocks of a model, by the first part of the fused names."""
    counts: dict[str, int] = {}
    for layer in FAMILIES[family].fused:
        prefix, start = layer.name.partition(".")[0], layer.parts[0].partition("{i}")[0]
        found = [index_of(name) for name in sizes if name.startswith(start)]
        counts[prefix] = max((index + 1 for index in found if index is not None), default=0)
    return counts
