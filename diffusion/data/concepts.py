"""Concepts that adapters are trained on, and pairs of them; some no gate is ever trained on."""

import hashlib
from typing import Literal, NamedTuple

import numpy as np

from diffusion.data.drawings import STYLES, Drawings

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


PER_SUBJECT = 3  # test pairs of each subject; each style is then in two of them

SECONDS = (
    "inverted", "swapped", "upside_down", "grey", "framed", "sepia", "tiled", "night", "rainbow",
    "checkered",
)  # fmt: skip
"""Styles that are put on a drawing that is in a style already."""


class Combination(NamedTuple):
    """Adapters that should work together.

    Attributes:
        subject: Its subgroup.
        styles: One style, or two that are applied in order.
    """

    subject: str
    styles: tuple[str, ...]

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters, the subject first."""
        return (self.subject, *self.styles)

    @property
    def name(self) -> str:
        """Name in tables."""
        return " + ".join(self.adapters)

    def caption(self, annotation: str) -> str:
        """Return the caption of a drawing of the subject in these styles."""
        return caption_of(annotation, self.styles)


def held_out_pairs() -> list[Combination]:
    """Return 48 pairs for tests: each subject in three of them, each style in two."""
    names = list(STYLES)
    return [
        Combination(subject, (names[(place * PER_SUBJECT + number) % len(names)],))
        for place, subject in enumerate(SUBJECTS)
        for number in range(PER_SUBJECT)
    ]


def training_pairs() -> list[Combination]:
    """Return the other 336 pairs."""
    tested = set(held_out_pairs())
    every = [Combination(subject, (style,)) for subject in SUBJECTS for style in STYLES]
    return [pair for pair in every if pair not in tested]


def with_second_style(pairs: list[Combination], shift: int = 0) -> list[Combination]:
    """Return each pair with one more style, each of which is about equally frequent.

    Args:
        pairs: Subjects with one style.
        shift: Place in the list of second styles where it begins.
    """
    found = []
    for place, pair in enumerate(pairs):
        second = SECONDS[(place + shift) % len(SECONDS)]
        if second == pair.styles[0]:
            second = SECONDS[(place + shift + 1) % len(SECONDS)]
        found.append(Combination(pair.subject, (*pair.styles, second)))
    return found
