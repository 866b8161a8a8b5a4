"""Concepts that adapters are trained on, and which drawings each of them may see."""

import hashlib
from typing import Literal, NamedTuple

import numpy as np

from diffusion.data.drawings import Drawings
from diffusion.data.styles import STYLES

SUBJECTS = (
    "animal-bird", "animal-bug", "animal-mammal", "clothing", "drink", "food-fruit",
    "food-vegetable", "heart", "musical-instrument", "place-building", "sky-weather", "sport",
    "time", "tool", "transport-ground", "zodiac",
)  # fmt: skip
"""Subgroups that the base has never seen; each has an adapter."""

Kind = Literal["subject", "style"]
Part = Literal["adapter", "gate", "test"]
PARTS: tuple[Part, ...] = ("adapter", "adapter", "adapter", "gate", "test")
"""What each fifth of the drawings of a subgroup serves: adapters, gates and tuning, or tests."""


class Concept(NamedTuple):
    """What an adapter adds to the base.

    Attributes:
        name: Of the subgroup or the style.
        kind: Of the concept.
    """

    name: str
    kind: Kind


def concepts() -> list[Concept]:
    """Return all 40 concepts: subjects, then styles."""
    return [*map(subject, SUBJECTS), *map(style, STYLES)]


def subject(name: str) -> Concept:
    """Return the concept of a subgroup."""
    return Concept(name, "subject")


def style(name: str) -> Concept:
    """Return the concept of a style."""
    return Concept(name, "style")


def caption_of(annotation: str, styles: tuple[str, ...] = ()) -> str:
    """Return the caption of a drawing in styles, such as ``grapes, Noto style``."""
    return ", ".join([annotation, *(STYLES[name].phrase for name in styles)])


def base_rows(drawings: Drawings) -> np.ndarray:
    """Return the rows that the base is trained on: no subject is among them."""
    return np.flatnonzero(~np.isin(drawings.subgroups, SUBJECTS))


def parts_of(drawings: Drawings, rows: np.ndarray) -> np.ndarray:
    """Return which part each row belongs to, in an order that only depends on the code points.

    Args:
        drawings: All.
        rows: Of one subgroup, or of all that a style is drawn of.
    """
    keys = [hashlib.sha256(drawings.hexcodes[row].encode()).hexdigest() for row in rows]
    ranks = np.argsort(np.argsort(np.array(keys)))
    return np.array(PARTS)[ranks % len(PARTS)]


def rows_of(drawings: Drawings, concept: Concept, part: Part) -> np.ndarray:
    """Return the rows of a concept in one part.

    Those of a subject are its drawings that all hands have drawn; those of a style are the rows
    of the base, which no subject shares.
    """
    if concept.kind == "subject":
        rows = np.flatnonzero((drawings.subgroups == concept.name) & drawings.whole)
    else:
        rows = base_rows(drawings)
        rows = rows[drawings.whole[rows]]
    return rows[parts_of(drawings, rows) == part]


def styles_of(concept: Concept) -> tuple[str, ...]:
    """Return the styles that the drawings of a concept are in."""
    return () if concept.kind == "subject" else (concept.name,)
