"""The name of a tensor, taken apart: prefix · layer · factor."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from diffusion.lora_file.factors import Spelled, spell, unsupported
from diffusion.lora_file.names import PREFIXES, TABLES, TEXT_ENCODERS, Match, Prefix
from diffusion.lora_file.names.prefixes import TRANSFORMER


class Key(NamedTuple):
    """A name taken apart.

    Attributes:
        name: As in the file.
        spelled: The factor and what comes before it; None if it ends with no known factor.
        prefix: The start; None if the layer is unknown.
        layer: The name of the layer without prefix, in the dialect of the file.
        matches: Family to what the layer is in diffusers; the family of a text encoder is empty.
    """

    name: str
    spelled: Spelled | None
    prefix: Prefix | None = None
    layer: str = ""
    matches: Mapping[str, Match] = {}

    @property
    def of_transformer(self) -> bool:
        """Whether it belongs to the transformer."""
        return self.prefix is not None and self.prefix.component == TRANSFORMER

    def reason(self, family: str) -> str:
        """Return why it cannot be used in a family; empty if it can."""
        if self.spelled is None:
            what = unsupported(self.name)
            if what is None:
                return "its name ends with no known factor"
            return f"it is {what}, which is not supported"
        if self.prefix is None:
            return "no dialect has a layer of this name"
        if self.of_transformer and family not in self.matches:
            return f"{family} has no layer of this name"
        return ""


def take_apart(names: Iterable[str]) -> list[Key]:
    """Take the names of the tensors of a file apart."""
    known: dict[str, tuple[Prefix | None, str, dict[str, Match]]] = {}
    keys = []
    for name in sorted(names):
        spelled = spell(name)
        if spelled is None:
            keys.append(Key(name, None))
            continue
        if spelled.stem not in known:
            known[spelled.stem] = _find(spelled.stem)
        keys.append(Key(name, spelled, *known[spelled.stem]))
    return keys


def _find(stem: str) -> tuple[Prefix | None, str, dict[str, Match]]:
    """Return prefix, layer and matches of a name without its factor."""
    for prefix in PREFIXES:
        if not stem.startswith(prefix.text):
            continue
        layer = stem[len(prefix.text) :]
        if prefix.component != TRANSFORMER:
            if match := TEXT_ENCODERS.find(layer):
                return prefix, layer, {"": match}
            continue
        found: dict[str, Match] = {}
        for table in TABLES:
            if table.family not in found and (match := table.find(layer)):
                found[table.family] = match
        if found:
            return prefix, layer, found
    return None, "", {}


def fitting_families(keys: Iterable[Key]) -> list[str]:
    """Return the families whose names fit the largest number of tensors of the transformer."""
    votes: dict[str, int] = {}
    for key in keys:
        if key.of_transformer:
            for family in key.matches:
                votes[family] = votes.get(family, 0) + 1
    return [family for family, count in votes.items() if count == max(votes.values())]
