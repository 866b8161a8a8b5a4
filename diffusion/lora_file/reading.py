"""Read a file of adapters in any known dialect; nothing is left out silently."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from diffusion.lora_file.bundle import LazyFactors, LoraBundle, Recipe, Values
from diffusion.lora_file.container import (
    LIMITS,
    FamilyError,
    Limits,
    LoraFileError,
    SafetensorsFile,
    listed,
)
from diffusion.lora_file.family import FAMILIES, Family
from diffusion.lora_file.mapping_report import Dialect, Fate, MappingError, MappingReport
from diffusion.lora_file.names import TRANSFORMER
from diffusion.lora_file.recipes import Context, Entry, component_of, gather, recipes_of
from diffusion.lora_file.recognition import (
    Key,
    by_own_names,
    fitting_families,
    recognize,
    take_apart,
)
from diffusion.lora_file.scales import config_settings, header_settings, locate, name_of


class Findings(NamedTuple):
    """What the values of an adapter show.

    Attributes:
        nonfinite: Layers with NaN or infinity.
        zero: Layers whose change is zero.
        total: Number of layers.
    """

    nonfinite: tuple[str, ...]
    zero: tuple[str, ...]
    total: int

    @property
    def all_zero(self) -> bool:
        """Whether the adapter changes nothing."""
        return self.total > 0 and len(self.zero) == self.total


def find(bundle: LoraBundle) -> Findings:
    """Read all values once; layers of text encoders are named with their component."""
    nonfinite, zero, total = [], [], 0
    for component, modules in {"": bundle.modules, **bundle.text_encoders}.items():
        for name in modules:
            label = f"{component}.{name}" if component else name
            values = (
                modules.examine(name)
                if isinstance(modules, LazyFactors)
                else Values.of(modules[name])
            )
            total += 1
            if not values.finite:
                nonfinite.append(label)
            elif values.zero:
                zero.append(label)
    return Findings(tuple(nonfinite), tuple(zero), total)


Base = str | Mapping[str, tuple[int, int]]
"""Name of a family, or diffusers name of every linear layer to its inputs and outputs."""


def load_lora(
    path: str | Path,
    base: Base | None = None,
    *,
    strict: bool = True,
    config: str | Path | None = None,
    limits: Limits = LIMITS,
    any_family: bool = False,
) -> LoraBundle:
    """Read an adapter for FLUX.1 or SD3, or for any model.

    Args:
        path: A ``.safetensors`` file, or a folder as PEFT writes it.
        base: What it is for; without it, the file decides.
        strict: Refuse a file of which a tensor is unknown or does not fit the base or the other
            layers, that changes nothing, or that holds NaN. Otherwise the report lists it.
        config: ``adapter_config.json`` of PEFT; by default the one next to the file.
        limits: What the file may cost.
        any_family: Read an adapter for other models, too, by the names of its layers alone: those
            of U-Nets are called as in diffusers, all others as in the file.

    Raises:
        ContainerError: The file is unsafe or damaged.
        FamilyError: It is for other models.
        MappingError: See ``strict``; its attribute ``report`` has the details.
    """
    place, config_path = locate(Path(path), None if config is None else Path(config))
    file = SafetensorsFile(place, limits)
    keys = take_apart(file.tensors)
    family, evidence = _family(file, keys, base, any_family=any_family)
    if family not in FAMILIES:
        keys = by_own_names(keys, family)
    settings = header_settings(file.metadata)
    if config_path is not None:
        stated = config_settings(config_path)
        settings |= {component_of(key, family): stated for key in keys if key.prefix}
    sizes = None if isinstance(base, str) else base
    whole = FAMILIES.get(family, Family(family, {}, ()))
    bundle = _read(keys, evidence, Context(file, whole, settings, sizes))
    report = bundle.report
    if strict and report is not None and (summary := report.summary()):
        raise MappingError(
            f"{file.label}: {summary}; get the file again, or leave that out by --lenient of merge"
            " or convert",
            report,
        )
    return dataclasses.replace(bundle, name=name_of(place))


def recognize_file(file: SafetensorsFile) -> tuple[str, str]:
    """Return the family that a file is for, also one that cannot be fused, and the evidence."""
    keys = take_apart(file.tensors)
    shapes = {name: entry.shape for name, entry in file.tensors.items()}
    return recognize(shapes, file.metadata, fitting_families(keys))


def _family(
    file: SafetensorsFile, keys: list[Key], base: Base | None, *, any_family: bool
) -> tuple[str, str]:
    """Return the family to read a file for, and the evidence.

    Raises:
        FamilyError: It is for models of another one.
    """
    shapes = {name: entry.shape for name, entry in file.tensors.items()}
    family, evidence = recognize(shapes, file.metadata, fitting := fitting_families(keys))
    wanted = None if base is None else base if isinstance(base, str) else _family_of(base)
    if wanted is not None and wanted not in FAMILIES:
        raise FamilyError(f"the base is of family {wanted!r}; choose one of {', '.join(FAMILIES)}")
    undecided = family in (*FAMILIES, "unknown") or evidence.startswith("number")
    if wanted is not None and undecided and (wanted in fitting or family == "unknown"):
        return wanted, "the base"
    if any_family and wanted is None:
        return family, evidence
    if family not in FAMILIES and family != "unknown":
        raise FamilyError(
            f"{file.label} is an adapter for {family} ({evidence}), expected one for "
            f"{wanted or ' or '.join(FAMILIES)}; only its metadata can be used"
        )
    if wanted is not None and family != wanted and fitting:
        raise FamilyError(
            f"{file.label} is an adapter for {family} ({evidence}), but the base is {wanted}"
        )
    return wanted or (family if family in FAMILIES else "flux"), evidence


def _family_of(base: Mapping[str, tuple[int, int]]) -> str | None:
    """Return the family of a base by its layers; None if it holds none that decides."""
    if any(name == "x_embedder" or name.startswith("single_transformer_blocks.") for name in base):
        return "flux"
    return "sd3" if any(name == "context_embedder" or ".attn2." in name for name in base) else None


def _read(keys: list[Key], evidence: str, context: Context) -> LoraBundle:
    family = context.family.name
    entries, left = gather(keys, family)
    recipes: dict[str, dict[str, Recipe]] = {}
    owners: dict[tuple[str, str], Entry] = {}
    complaints: list[str] = []
    assumed = 0
    for entry in entries:
        try:
            by_part, complaint = recipes_of(entry, context)
        except (ValueError, LoraFileError) as error:
            left |= dict.fromkeys(entry.keys.values(), str(error))
            continue
        if complaint:
            complaints.append(f"{entry.layer}: {complaint}")
        assumed += "alpha" not in entry.keys and entry.component not in context.settings
        recipes.setdefault(entry.component, {}).update(by_part)
        owners |= {(entry.component, part): entry for part in by_part}
    transformer = recipes.pop(TRANSFORMER, {})
    if context.base is None:
        shapes = {name: recipe.sizes[1:] for name, recipe in transformer.items()}
        for name, expected in context.family.misfits(shapes).items():
            sizes = " → ".join(map(str, shapes[name]))
            reason = f"it changes a layer of {sizes} features, expected {expected} like the others"
            entry = owners[TRANSFORMER, name]
            left |= dict.fromkeys(entry.keys.values(), reason)
            for part in entry.match.parts:
                transformer.pop(part, None)
    bundle = LoraBundle(
        family,
        LazyFactors(transformer),
        {component: LazyFactors(layers) for component, layers in sorted(recipes.items())},
        context.file.metadata,
        None,
        _storage(context.file),
    )
    fates = _fates(keys, family, left, owners)
    notes = [evidence] if evidence.endswith("assumed") else []
    if assumed:
        states = "layer states" if assumed == 1 else "layers state"
        notes.append(f"{assumed} {states} no α, α = r is assumed")
    report = MappingReport(fates, family, evidence, notes=tuple(notes))
    return _reported(bundle, report, complaints, keys)


def _reported(
    bundle: LoraBundle, report: MappingReport, complaints: list[str], keys: list[Key]
) -> LoraBundle:
    """Return the bundle with its report, once the values are known."""
    faults = find(bundle)
    problems = []
    if not bundle.modules:
        others = listed(sorted(bundle.text_encoders)) or "nothing"
        problems.append(f"no layer of the transformer is changed, what it changes is {others}")
    if complaints:
        problems.append(listed(complaints, 1))
    if faults.nonfinite:
        problems.append(f"NaN or infinity in {listed(list(faults.nonfinite))}")
    if faults.all_zero:
        problems.append("the change of every layer is zero")
    adapters = {key.spelled.adapter for key in keys if key.spelled and key.spelled.adapter}
    if len(adapters) > 1:
        problems.append(f"it holds several adapters: {listed(sorted(adapters))}")
    report = report._replace(problems=tuple(problems), zero=faults.zero)
    return dataclasses.replace(bundle, report=report)


def _fates(
    keys: list[Key],
    family: str,
    left: Mapping[str, str],
    owners: Mapping[tuple[str, str], Entry],
) -> tuple[Fate, ...]:
    kinds = {key: entry.kind.name for entry in owners.values() for key in entry.keys.values()}
    fates = []
    for key in keys:
        match = key.matches.get(family if key.of_transformer else "")
        dialect = None
        if match is not None and key.prefix is not None and key.spelled is not None:
            dialect = Dialect(
                key.prefix.text,
                match.dialect,
                key.spelled.spelling,
                match.underscored,
                kinds.get(key.name, ""),
            )
        component, reason = component_of(key, family), left.get(key.name, "")
        parts = () if match is None or reason else match.parts
        modules = tuple(part for part in parts if (component, part) in owners)
        fates.append(Fate(key.name, component, modules, dialect, reason))
    return tuple(fates)


def _storage(file: SafetensorsFile) -> torch.dtype:
    """Return the dtype of most factors; scalars do not count."""
    stored = (entry for entry in file.tensors.values() if len(entry.shape) > 1)
    count = Counter(entry.dtype for entry in stored if entry.dtype.is_floating_point)
    return count.most_common(1)[0][0] if count else torch.float32
