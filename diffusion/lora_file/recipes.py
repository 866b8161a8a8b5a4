"""How to get the canonical factors of the layers from the tensors of an entry."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.lora_file.container import SafetensorsFile
from diffusion.lora_file.entries import Entry
from diffusion.lora_file.factors import magnitude_matrix
from diffusion.lora_file.factors.change import Factors
from diffusion.lora_file.family import Family
from diffusion.lora_file.fusing import own_components, split
from diffusion.lora_file.lazy import Recipe, Sizes
from diffusion.lora_file.names.prefixes import TRANSFORMER
from diffusion.lora_file.scales import Settings

MAX_ELEMENTS = 2**28
"""Elements of a factor after LoHa or LoKr is expanded, 1 GiB in float32."""


class Context(NamedTuple):
    """What all layers of a file are read with.

    Attributes:
        file: Where the tensors are.
        family: Of the transformer.
        settings: Of the adapter, by component.
        base: diffusers name to inputs and outputs of the base; None if no base is given.
    """

    file: SafetensorsFile
    family: Family
    settings: Mapping[str, Settings]
    base: Mapping[str, tuple[int, int]] | None


def recipes_of(entry: Entry, context: Context) -> tuple[dict[str, Recipe], str]:
    """Check an entry by shapes alone.

    Returns:
        Recipes by diffusers name, and what is wrong with its α; empty if nothing is.

    Raises:
        ValueError: A shape does not fit, or a value is not finite.
        LoraFileError: The factors cannot be split.
    """
    shapes = _meta(entry, context.file)
    rank = entry.kind.rank(shapes)
    if rank is not None and not 1 <= rank <= context.file.limits.rank:
        raise ValueError(f"its rank is {rank}, expected 1 to {context.file.limits.rank}")
    settings, alpha = context.settings.get(entry.component), _alpha(entry, context.file)
    if settings is not None and settings.dora and "magnitude" not in entry.keys:
        raise ValueError("the settings of the adapter state DoRA, but its magnitude is missing")
    scale = _scale(entry, settings, rank, alpha)
    meta = _build(entry, shapes, scale)
    sizes = _part_sizes(entry, meta, context)
    _check_magnitude(meta, len(sizes) > 1)
    components = None
    if len(sizes) > 1 and entry.kind.name == "lora" and meta.magnitude is None:
        whole = _load(entry, context.file, scale)
        components = own_components(whole.up, sizes)

    def loader(number: int) -> Recipe:
        rank = meta.rank if components is None else len(components[number])

        def load() -> Factors:
            return split(_load(entry, context.file, scale), sizes, components)[number]

        return Recipe(Sizes(rank, meta.in_features, sizes[number]), load)

    recipes = {part: loader(number) for number, part in enumerate(entry.match.parts)}
    complaint = "" if alpha is None or alpha > 0 else f"α is {alpha:g}, expected a positive number"
    return {part: r for part, r in recipes.items() if r.sizes.rank}, complaint


def _meta(entry: Entry, file: SafetensorsFile) -> dict[str, Tensor]:
    """Return tensors without data, of the shapes of the file."""
    found = {}
    for role, key in entry.keys.items():
        stored = file.tensors[key]
        if role != "alpha" and (not stored.dtype.is_floating_point or 0 in stored.shape):
            raise ValueError(
                f"{role} is {stored.dtype} of shape {tuple(stored.shape)}, expected floating-point "
                "numbers"
            )
        found[role] = torch.empty(stored.shape, device="meta", dtype=torch.float32)
    return found


def _alpha(entry: Entry, file: SafetensorsFile) -> float | None:
    if "alpha" not in entry.keys:
        return None
    stored = file.tensors[entry.keys["alpha"]]
    if math.prod(stored.shape) != 1:
        raise ValueError(f"α has the shape {tuple(stored.shape)}, expected one number")
    alpha = float(file.tensor(entry.keys["alpha"]).double().reshape(()))
    if not math.isfinite(alpha):
        raise ValueError(f"α is {alpha}, expected a finite number")
    return alpha


def _scale(entry: Entry, settings: Settings | None, rank: int | None, alpha: float | None) -> float:
    if alpha is not None:
        return 1.0 if rank is None else alpha / rank
    return 1.0 if settings is None else settings.scale(entry.layer, rank)


def _build(entry: Entry, stored: Mapping[str, Tensor], scale: float) -> Factors:
    """Reduce the stored factors to a pair; works on meta tensors, too."""
    try:
        pair = entry.kind.build(stored)
    except RuntimeError as error:
        shapes = ", ".join(f"{role} {tuple(stored[role].shape)}" for role in sorted(entry.factors))
        raise ValueError(f"factors of these shapes do not fit each other: {shapes}") from error
    if pair.down.shape[0] != pair.up.shape[1]:
        raise ValueError(
            f"factors of ranks {pair.down.shape[0]} and {pair.up.shape[1]} do not fit each other"
        )
    if max(pair.down.numel(), pair.up.numel()) > MAX_ELEMENTS:
        raise ValueError(
            f"its factors expand to {max(pair.down.numel(), pair.up.numel())} numbers, more than "
            f"the limit of {MAX_ELEMENTS}"
        )
    magnitude = stored.get("magnitude")
    factors = Factors(
        pair.down, pair.up, scale, None if magnitude is None else magnitude_matrix(magnitude)
    )
    return factors.swapped() if _is_swapped(entry, factors) else factors


def _is_swapped(entry: Entry, factors: Factors) -> bool:
    if entry.match.swapped == "last":
        return factors.out_features == 2 * factors.in_features
    return entry.match.swapped == "always"


def _load(entry: Entry, file: SafetensorsFile, scale: float) -> Factors:
    """Read the factors, as float32, or float64 if they are stored so."""
    stored = {}
    for role, key in entry.keys.items():
        if role != "alpha":
            tensor = file.tensor(key)
            stored[role] = tensor if tensor.dtype == torch.float64 else tensor.float()
    return _build(entry, stored, scale)


def _part_sizes(entry: Entry, factors: Factors, context: Context) -> list[int]:
    """Return the outputs of each part, those of the base or those that follow from the inputs.

    Raises:
        ValueError: They are not those of the factors.
    """
    parts, family = entry.match.parts, context.family
    if entry.component != TRANSFORMER:
        return [factors.out_features]
    if context.base is not None:
        if lacking := [part for part in parts if part not in context.base]:
            raise ValueError(f"the base has no layer {lacking[0]}")
        inputs = {context.base[part][0] for part in parts}
        sizes: list[int] = [context.base[part][1] for part in parts]
    else:
        inputs = {factors.in_features}
        wanted = [family.out_features(part, factors.in_features) for part in parts]
        if len(parts) == 1:
            return [factors.out_features]
        sizes = [size for size in wanted if size is not None]
    if inputs != {factors.in_features} or sum(sizes) != factors.out_features:
        expected = f"{' or '.join(map(str, sorted(inputs)))} → {' + '.join(map(str, sizes))}"
        found = f"{factors.in_features} → {factors.out_features}"
        raise ValueError(f"it changes a layer of {found} features, expected {expected}")
    return sizes


def _check_magnitude(factors: Factors, fused: bool) -> None:
    """Refuse a magnitude that is of other sizes than the layer.

    Raises:
        ValueError: It does not fit.
        LoraFileError: It belongs to all parts of a fused layer.
    """
    if factors.magnitude is None:
        return
    shape = tuple(factors.magnitude.shape)
    if shape not in ((factors.out_features, 1), (1, factors.in_features)):
        raise ValueError(
            f"the magnitude of DoRA is {shape[0]}x{shape[1]}, expected {factors.out_features}x1 or "
            f"1x{factors.in_features}"
        )
    if fused:
        factors.rows(0, 1)
