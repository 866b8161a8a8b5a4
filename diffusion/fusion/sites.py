"""Where a model takes adapters: at its linear layers, some of which published gates see fused."""

from collections.abc import Iterable

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from diffusion.lora_file.family import FAMILIES, Placed
from diffusion.lora_file.family.layers import index_of

KINDS = {"FluxTransformer2DModel": "flux", "SD3Transformer2DModel": "sd3"}
"""Class of a model of diffusers -> its family."""

TIME_SCALES = {"flux": 1000.0, "sd3": 1.0}
"""Times of gates, from 0 to 1000, by those that models of a family are called with."""


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
    fused = [] if family is None else _fused(family, sizes)
    taken = {part for site in fused for part in site.parts}
    alone = [
        Placed(name, name, (name,), inputs, (outputs,))
        for name, (inputs, outputs) in sizes.items()
        if name not in taken
    ]
    return [*fused, *alone]


def _fused(family: str, sizes: dict[str, tuple[int, int]]) -> list[Placed]:
    known, placed = FAMILIES[family], []
    lists = dict.fromkeys(layer.name.partition(".")[0] for layer in known.fused)
    for prefix in lists:
        own = [layer for layer in known.fused if layer.name.startswith(f"{prefix}.")]
        for i in _blocks((part for layer in own for part in layer.parts), sizes):
            for layer in own:
                parts = tuple(part.format(i=i) for part in layer.parts)
                parts = tuple(part for part in parts if part in sizes)
                if parts:
                    outputs = tuple(sizes[part][1] for part in parts)
                    name = layer.name.format(i=i)
                    placed.append(Placed(name, layer.type, parts, sizes[parts[0]][0], outputs))
    return placed


def _blocks(templates: Iterable[str], sizes: Iterable[str]) -> list[int]:
    """Return the numbers of the blocks of a list."""
    starts = {template.partition("{i}")[0] for template in templates}
    found = {
        index
        for name in sizes
        for start in starts
        if name.startswith(start) and (index := index_of(name)) is not None
    }
    return sorted(found)
