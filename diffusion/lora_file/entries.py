"""The tensors of one layer of a file, together."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from diffusion.lora_file.factors import KINDS, Kind
from diffusion.lora_file.keys import Key
from diffusion.lora_file.names import Match
from diffusion.lora_file.names.prefixes import TRANSFORMER, encoder_name

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
    """Gather the tensors of each layer.

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
    own = [kind for kind in KINDS if roles <= kind.roles]
    if not own:
        return None, "its layer holds factors of several kinds"
    missing = min((form - roles for form in own[0].forms if roles <= form), key=len, default=None)
    if missing is None:
        return None, f"its layer holds factors of {own[0].name} that exclude each other"
    return None, f"its layer lacks the factor {', '.join(sorted(missing))}"
