"""A table from the names of a dialect to diffusers names."""

from collections.abc import Mapping
from typing import NamedTuple

from diffusion.lora_file.family.layers import index_of, template_of


class Row(NamedTuple):
    """What a layer of a dialect is in diffusers.

    Attributes:
        parts: Templates of diffusers names; the rows of a fused layer belong to one after another.
        swapped: Whether the halves of the output are in the opposite order: ``always``, ``never``,
            or ``last``: where the output is two widths wide, in the last block.
    """

    parts: tuple[str, ...]
    swapped: str = "never"


class Match(NamedTuple):
    """A layer of a file and what it is in diffusers.

    Attributes:
        dialect: Name of the table.
        parts: diffusers names.
        swapped: See :class:`Row`.
        underscored: Whether underscores replace the dots of the name.
    """

    dialect: str
    parts: tuple[str, ...]
    swapped: str
    underscored: bool


class NameTable:
    """The names of one dialect, with dots or with underscores in place of the dots.

    Args:
        name: Of the dialect.
        family: Of the models.
        rows: Template of a name in the dialect to its parts.
    """

    def __init__(self, name: str, family: str, rows: Mapping[str, Row]) -> None:
        self.name = name
        self.family = family
        self.rows = dict(rows)
        self._underscored = {template.replace(".", "_"): row for template, row in rows.items()}

    def find(self, stem: str) -> Match | None:
        """Return what a name without prefix and factor is in diffusers; None if it is unknown."""
        template = template_of(stem)
        row = self.rows.get(template)
        underscored = row is None
        row = self._underscored.get(template) if row is None else row
        if row is None:
            return None
        index = index_of(stem)
        parts = tuple(part.replace("{i}", str(index)) for part in row.parts)
        return Match(self.name, parts, row.swapped, underscored)

    def inverse(self) -> dict[tuple[str, ...], tuple[str, str]]:
        """Return the parts of each row, to its name in the dialect and whether it is swapped."""
        return {row.parts: (name, row.swapped) for name, row in self.rows.items()}
