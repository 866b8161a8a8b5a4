"""The layers that an encoder of adapters reads: those of a base, fused, in the published order."""

from collections.abc import Sequence
from typing import NamedTuple

from diffusion.lora_file import FluxShape, LoraBundle, SD3Shape
from diffusion.lora_file.errors import LoraFileError
from diffusion.lora_file.family import Placed

Shape = FluxShape | SD3Shape
SHAPES: dict[str, type[Shape]] = {"flux": FluxShape, "sd3": SD3Shape}
"""Family of models -> the numbers that its layers follow from."""


def family_of(shape: Shape) -> str:
    """Return the family of models that a shape belongs to."""
    return next(family for family, kind in SHAPES.items() if isinstance(shape, kind))


def modules_of(shape: Shape, types: Sequence[str] | None = None) -> tuple[Placed, ...]:
    """Return the fused layers of a base, in the order of the published encoder.

    A layer that has another number of outputs than the first one of its type, as in the last block
    of SD3, gets its own type, such as ``norm1_b.linear.3072``: one projection cannot serve both.

    Args:
        shape: Of the base.
        types: Types of layers that are kept; None for all.

    Raises:
        LoraFileError: A type does not exist in this base, or none is given.
    """
    first: dict[str, int] = {}
    placed = []
    for module in shape.fused():
        if module.out_features != first.setdefault(module.type, module.out_features):
            module = module._replace(type=f"{module.type}.{module.out_features}")
        placed.append(module)
    known = dict.fromkeys(module.type for module in placed)
    unknown = [] if types is None else [kind for kind in types if kind not in known]
    if unknown or (types is not None and not types):
        found = f"{', '.join(unknown)}, which this base lacks" if unknown else "none"
        raise LoraFileError(f"the types of layers name {found}; choose from {', '.join(known)}")
    return tuple(module for module in placed if types is None or module.type in types)


def types_used(shape: Shape, bundles: Sequence[LoraBundle]) -> tuple[str, ...]:
    """Return the types of layers that at least one of some adapters changes."""
    changed = {name for bundle in bundles for name in bundle.modules}
    used = [module.type for module in modules_of(shape) if changed.intersection(module.parts)]
    return tuple(dict.fromkeys(used))


class Fit(NamedTuple):
    """How the layers of an adapter fit those that an encoder reads.

    Attributes:
        read: Number of fused layers that are read.
        missing: Fused layers that the adapter does not change.
        misfits: Layers of another size, each with what was expected.
    """

    read: int
    missing: tuple[str, ...]
    misfits: tuple[str, ...]


def fit(bundle: LoraBundle, modules: Sequence[Placed]) -> Fit:
    """Compare the layers of an adapter with those that an encoder reads, by their sizes alone."""
    sizes = bundle.sizes()
    missing, misfits = [], []
    for module in modules:
        parts = [(part, out) for part, out in zip(module.parts, module.sizes, strict=True)]
        if not any(part in sizes for part in module.parts):
            missing.append(module.name)
        for part, out in parts:
            found = sizes.get(part)
            if found and (found.in_features, found.out_features) != (module.in_features, out):
                misfits.append(
                    f"{part} is {found.in_features} → {found.out_features}, "
                    f"expected {module.in_features} → {out}"
                )
    return Fit(len(modules) - len(missing), tuple(missing), tuple(misfits))
