"""From the tensors of one layer of a file to its canonical factors."""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.lora_file.bundle import Recipe, Values, are_finite, own_components, split
from diffusion.lora_file.container import LoraFileError, SafetensorsFile
from diffusion.lora_file.factors import (
    COLUMNS,
    KINDS,
    Factors,
    Kind,
    Sizes,
    magnitude_matrix,
    magnitude_shape,
)
from diffusion.lora_file.family import Family
from diffusion.lora_file.names import TRANSFORMER, Match, encoder_name
from diffusion.lora_file.recognition import Key
from diffusion.lora_file.scales import Settings

_ASIDE = {"alpha", "magnitude"}


class Entry(NamedTuple):
    """The tensors of one layer.

    Attributes:
        component: ``transformer`` or a text encoder such as ``text_encoder``.
        layer: Name in the dialect of the file, without prefix.
        match: What the layer is in diffusers.
        keys: Role to the name of the tensor.
        kind: Of the factors.
    """

    component: str
    layer: str
    match: Match
    keys: Mapping[str, str]
    kind: Kind

    @property
    def factors(self) -> dict[str, str]:
        """Role to the name of the tensor, without α and magnitude."""
        return {role: key for role, key in self.keys.items() if role not in _ASIDE}


def component_of(key: Key, family: str) -> str:
    """Return the network that a tensor belongs to; empty if it is unknown."""
    if key.prefix is None:
        return ""
    component = key.prefix.component
    return TRANSFORMER if component == TRANSFORMER else encoder_name(family, component)


def gather(keys: Iterable[Key], family: str) -> tuple[list[Entry], dict[str, str]]:
    """Group tensors by layer; return the layers, and why each other tensor is left out.

    Returns:
        The layers, and the reason for each tensor that is left out.
    """
    groups: dict[str, list[Key]] = {}
    left: dict[str, str] = {}
    for key in keys:
        if reason := key.reason(family):
            left[key.name] = reason
        elif key.spelled is not None:
            groups.setdefault(key.spelled.stem, []).append(key)
    entries: list[Entry] = []
    taken: dict[tuple[str, str], str] = {}
    for stem, group in groups.items():
        entry, reason = _entry(group, family)
        if entry is not None:
            places = [(entry.component, part) for part in entry.match.parts]
            double = next((taken[place] for place in places if place in taken), None)
            if double is not None:
                entry, reason = None, f"{double} changes the same layer"
            taken.update(dict.fromkeys(places, stem))
        if entry is None:
            left.update({key.name: reason for key in group})
        else:
            entries.append(entry)
    return entries, left


def _entry(group: list[Key], family: str) -> tuple[Entry | None, str]:
    first = group[0]
    roles: dict[str, str] = {}
    for key in group:
        assert key.spelled is not None
        if key.spelled.role in roles:
            return None, f"it is the same factor as {roles[key.spelled.role]}"
        roles[key.spelled.role] = key.name
    kind, reason = _kind(frozenset(roles) - _ASIDE)
    if kind is None:
        return None, reason
    match = first.matches[family if first.of_transformer else ""]
    return Entry(component_of(first, family), first.layer, match, roles, kind), ""


def _kind(roles: frozenset[str]) -> tuple[Kind | None, str]:
    """Return the kind whose factors these are, or why there is none."""
    for kind in KINDS:
        if roles in kind.forms:
            return kind, ""
    if not roles:
        return None, "there are no factors with it"
    kinds = [kind for kind in KINDS if roles <= kind.roles]
    if not kinds:
        return None, "its layer holds factors of several kinds"
    missing = min((form - roles for form in kinds[0].forms if roles <= form), key=len, default=None)
    if missing is None:
        return None, f"its layer holds factors of {kinds[0].name} that exclude each other"
    return None, f"its layer lacks the factor {', '.join(sorted(missing))}"


MAX_ELEMENTS = 2**28  # elements of a factor after LoHa or LoKr is expanded, 1 GiB in float32


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
    shapes = _shapes(entry, context.file)
    first = shapes.get("mid", shapes.get("down", ()))
    kernel = tuple(first[2:]) or None
    if context.family.layers and kernel not in (None, (1, 1)):
        what = "x".join(map(str, first))
        raise ValueError(f"a factor is {what}, but {context.family.name} has linear layers alone")
    whole, rank = _whole_sizes(entry, shapes), entry.kind.rank(shapes)
    if rank is not None and rank > context.file.limits.rank:
        raise ValueError(f"its rank is {rank}, expected 1 to {context.file.limits.rank}")
    settings, alpha = context.settings.get(entry.component), _alpha(entry, context.file)
    if settings is not None and settings.dora and "magnitude" not in entry.keys:
        raise ValueError("the settings of the adapter state DoRA, but its magnitude is missing")
    scale = _scale(entry, settings, rank, alpha)
    parts = _part_sizes(entry, whole, context)
    components = None
    if len(parts) > 1 and entry.kind.name == "lora" and "magnitude" not in entry.keys:
        components = own_components(_load(entry, context.file, scale).up, parts)

    def recipe(number: int) -> Recipe:
        rows = None if components is None else components[number]
        rank = whole.rank if rows is None else len(rows)

        def load() -> Factors:
            factors = split(_load(entry, context.file, scale), parts, components)[number]
            return factors if context.family.layers else factors._replace(kernel=kernel)

        def examine() -> Values:
            if entry.kind.name == "lora":
                return Values.of(load())
            return _stored_values(entry, context.file, scale)

        return Recipe(Sizes(rank, whole.in_features, parts[number]), load, examine)

    recipes = {part: recipe(number) for number, part in enumerate(entry.match.parts)}
    complaint = "" if alpha is None or alpha > 0 else f"α is {alpha:g}, expected a positive number"
    return {part: r for part, r in recipes.items() if r.sizes.rank}, complaint


def _shapes(entry: Entry, file: SafetensorsFile) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the factors and of the magnitude, by role.

    Raises:
        ValueError: One holds no floating-point numbers.
    """
    shapes = {}
    for role, key in entry.keys.items():
        stored = file.tensors[key]
        if role == "alpha":
            continue
        if not stored.dtype.is_floating_point or 0 in stored.shape:
            raise ValueError(
                f"{role} is {stored.dtype} of shape {stored.shape}, expected floating-point numbers"
            )
        shapes[role] = stored.shape
    return shapes


def _whole_sizes(entry: Entry, shapes: Mapping[str, tuple[int, ...]]) -> Sizes:
    """Return the sizes of the factors before they are split.

    Raises:
        ValueError: The factors do not fit each other or the magnitude, or expand to too many.
        LoraFileError: The magnitude belongs to all parts of a fused layer.
    """
    sizes = entry.kind.sizes(shapes)
    elements = sizes.rank * max(sizes.in_features, sizes.out_features)
    if elements > MAX_ELEMENTS:
        raise ValueError(
            f"its factors expand to {elements} numbers, more than the limit of {MAX_ELEMENTS}"
        )
    if "magnitude" in shapes:
        rows, columns = magnitude_shape(shapes["magnitude"])
        if (rows, columns) not in ((sizes.out_features, 1), (1, sizes.in_features)):
            raise ValueError(
                f"the magnitude of DoRA is {rows}x{columns}, expected {sizes.out_features}x1 or "
                f"1x{sizes.in_features}"
            )
        if columns != 1 and len(entry.match.parts) > 1:
            raise LoraFileError(COLUMNS)
    return sizes


def _alpha(entry: Entry, file: SafetensorsFile) -> float | None:
    """Return α if it is stored.

    Raises:
        ValueError: It is not one finite number.
    """
    if "alpha" not in entry.keys:
        return None
    stored = file.tensors[entry.keys["alpha"]]
    if math.prod(stored.shape) != 1:
        raise ValueError(f"α has the shape {stored.shape}, expected one number")
    alpha = float(file.tensor(entry.keys["alpha"]).double().reshape(()))
    if not math.isfinite(alpha):
        raise ValueError(f"α is {alpha}, expected a finite number")
    return alpha


def _scale(entry: Entry, settings: Settings | None, rank: int | None, alpha: float | None) -> float:
    if alpha is not None:
        return 1.0 if rank is None else alpha / rank
    return 1.0 if settings is None else settings.scale(entry.layer, rank)


def _read(entry: Entry, file: SafetensorsFile) -> dict[str, Tensor]:
    """Read what is stored without α, as float32, or float64 if it is stored so."""
    tensors = {r: file.tensor(key) for r, key in entry.keys.items() if r != "alpha"}
    return {r: t if t.dtype == torch.float64 else t.float() for r, t in tensors.items()}


def _stored_values(entry: Entry, file: SafetensorsFile, scale: float) -> Values:
    """Return what stored factors show; a product of them is zero if one of them is."""
    stored = _read(entry, file)
    zero = scale == 0 or any(not stored[role].any() for role in entry.factors)
    return Values(are_finite(stored.values()), zero and "magnitude" not in stored)


def _load(entry: Entry, file: SafetensorsFile, scale: float) -> Factors:
    """Read the factors and reduce them to a pair."""
    stored = _read(entry, file)
    down, up = entry.kind.build(stored)
    magnitude = stored.get("magnitude")
    factors = Factors(down, up, scale, None if magnitude is None else magnitude_matrix(magnitude))
    last = factors.out_features == 2 * factors.in_features
    swapped = entry.match.swapped == "always" or (entry.match.swapped == "last" and last)
    return factors.swapped() if swapped else factors


def _part_sizes(entry: Entry, whole: Sizes, context: Context) -> list[int]:
    """Return the outputs of each part, those of the base or those that follow from the inputs.

    Raises:
        ValueError: They are not those of the factors.
    """
    parts, family = entry.match.parts, context.family
    if entry.component != TRANSFORMER or (context.base is None and len(parts) == 1):
        return [whole.out_features]
    if context.base is not None:
        if lacking := [part for part in parts if part not in context.base]:
            raise ValueError(f"the base has no layer {lacking[0]}")
        inputs = {context.base[part][0] for part in parts}
        sizes: list[int] = [context.base[part][1] for part in parts]
    else:
        inputs = {whole.in_features}
        wanted = [family.out_features(part, whole.in_features) for part in parts]
        sizes = [size for size in wanted if size is not None]
    if inputs != {whole.in_features} or sum(sizes) != whole.out_features:
        expected = f"{' or '.join(map(str, sorted(inputs)))} → {' + '.join(map(str, sizes))}"
        found = f"{whole.in_features} → {whole.out_features}"
        raise ValueError(f"it changes a layer of {found} features, expected {expected}")
    return sizes
